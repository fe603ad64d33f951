"""`pyquiet scale report`: what a run did, from its journal."""

import argparse
import json

from pyquiet.cli.reports import environment


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    what = "tables of a run from its journal"
    parser = actions.add_parser("report", help=what, description=f"{what.capitalize()}, finished or not.")
    parser.add_argument("journal", metavar="RUN.jsonl", help="what --journal kept")
    parser.add_argument("--calibration", metavar="FILE", help="journal of its calibration, whose time counts too")
    parser.add_argument("--against", metavar="FILE", help="journal of a baseline, for the speed-up")
    parser.add_argument("--plot", metavar="FILE", help="rates by turn and slots over time: .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run, command=parser.prog)


def run(args: argparse.Namespace) -> int:
    from pyquiet.plotting.scaling import plot_run
    from pyquiet.scaling.journal import read_journal
    from pyquiet.scaling.report import Report

    header, records = read_journal(args.journal)
    calibration = read_journal(args.calibration)[1] if args.calibration else ()
    report = Report.of(header, records, calibration=calibration)
    if args.plot:
        plot_run(report, records, args.plot)
    speedup = report.speedup(Report.of(*read_journal(args.against)), args.against) if args.against else None
    if args.json:
        more = {"speedup": speedup} if speedup else {}
        print(json.dumps(report.to_dict() | more | {"environment": environment(args)}, indent=2))
        return 0
    print(report)
    if speedup:
        print(f"{speedup['speedup']:.2f} times the speed of {speedup['baseline']}, calibration counted")
    return 0

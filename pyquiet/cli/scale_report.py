"""`pyquiet scale report`: what a run did, from its journal."""

import argparse

from pyquiet.cli.reports import add_json, check_json, give


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    what = "tables of a run from its journal"
    parser = actions.add_parser("report", help=what, description=f"{what.capitalize()}, finished or not.")
    parser.add_argument("journal", metavar="RUN.jsonl", help="what --journal kept")
    parser.add_argument("--calibration", metavar="FILE", help="journal of its calibration, whose time counts too")
    parser.add_argument("--against", metavar="FILE", help="journal of a baseline, for the speed-up")
    parser.add_argument("--plot", metavar="FILE", help="rates by turn and slots over time: .png, .svg or .pdf")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from pyquiet.plotting.scaling import plot_run
    from pyquiet.scaling.journal import read_journal
    from pyquiet.scaling.report import Report

    check_json(args)
    header, records = read_journal(args.journal)
    calibration = read_journal(args.calibration)[1] if args.calibration else ()
    report = Report.of(header, records, calibration=calibration)
    if args.plot:
        plot_run(report, records, args.plot)
    speedup = report.speedup(Report.of(*read_journal(args.against)), args.against) if args.against else None
    words = str(report)
    if speedup:
        words += f"\n{speedup['speedup']:.2f} times the speed of {speedup['baseline']}, calibration counted"
    give(args, report.to_dict() | ({"speedup": speedup} if speedup else {}), words)
    return 0

"""`pyquiet scale report`: what a run did, from its journal."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pyquiet.cli.reports import add_json, check_json, give
from pyquiet.cli.scale_models import calibration_journal

if TYPE_CHECKING:
    from pyquiet.scaling.records import Record


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    what = "tables of a run from its journal"
    parser = actions.add_parser("report", help=what, description=f"{what.capitalize()}, finished or not.")
    parser.add_argument("journal", metavar="RUN.jsonl", help="what --journal kept")
    parser.add_argument(
        "--calibration-journal",
        metavar="FILE",
        help="journal of its calibration, whose time counts too (default: RUN.jsonl.calibration.jsonl)",
    )
    parser.add_argument("--against", metavar="FILE", help="journal of a baseline, for the speed-up")
    parser.add_argument("--plot", metavar="FILE", help="rates, p-values and slots over time: .png, .svg or .pdf")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from pyquiet.plotting.scaling import plot_run
    from pyquiet.scaling.journal import read_journal
    from pyquiet.scaling.report import Report

    check_json(args)
    header, records = read_journal(args.journal)
    report = Report.of(header, records, calibration=_calibration(args.journal, args.calibration_journal))
    if args.plot:
        plot_run(report, records, args.plot)
    words, speedup = str(report), None
    if args.against:
        baseline = Report.of(*read_journal(args.against), calibration=_calibration(args.against))
        speedup = report.speedup(baseline, args.against)
        counted = f"calibration counted: {report.calibration:.1f} s here, {baseline.calibration:.1f} s there"
        words += f"\n{speedup['speedup']:.2f} times the speed of {speedup['baseline']}, {counted}"
    give(args, report.to_dict() | ({"speedup": speedup} if speedup else {}), words)
    return 0


def _calibration(journal: str, calibration: str | None = None) -> "list[Record]":
    """Records of a run's calibration: of the file that is named, else of the one beside its journal, if it is there."""
    from pyquiet.scaling.journal import read_journal

    file = calibration or calibration_journal(journal)
    return read_journal(file)[1] if calibration or Path(file).exists() else []

"""tpcore report: a run as one page."""

from __future__ import annotations

import argparse

from tpcore.cli.options import Commands


def add_commands(commands: Commands) -> None:
    """Add `report` to the command line."""
    report = commands.add_parser(
        "report",
        help="one HTML page about a run",
        description="Write one HTML page about a run, finished or not: curves, scores of classes, "
        "the worst examples, configuration and environment. The page needs no network.",
    )
    report.add_argument("run", help="folder of a run, or one above it: then its newest run")
    report.add_argument("--output", metavar="FILE", help="default: report.html in the run's folder")
    report.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> int:
    from tpcore.train.report import write_report

    print(write_report(arguments.run, arguments.output))
    return 0

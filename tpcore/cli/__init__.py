"""The `tpcore` command, a file for each family of commands.

Arguments are parsed before torch is imported, so that --help is quick.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from tpcore import memory
from tpcore.cli import convert, doctor, evaluate, finetune, plan, report
from tpcore.cli.options import Parser

DIVERGED = 1
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors of the user's are one line and status 2."""
    arguments = _parse(sys.argv[1:] if argv is None else list(argv))
    try:
        status = _run(arguments, may_restart=argv is None)
    except KeyboardInterrupt:
        from tpcore.train.launch import report_interrupt

        status = report_interrupt()
    if argv is None and status == INTERRUPTED:
        # Threads and pipes of a launcher that was interrupted complain while they are taken down.
        sys.stdout.flush()
        os._exit(status)
    return status


def _run(arguments: argparse.Namespace, *, may_restart: bool) -> int:
    from tpcore.train.faults import DivergedError, StoppedError
    from tpcore.train.launch import is_lost_rank, report_error, report_lost_rank, report_stopped

    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        if may_restart and arguments.restarts:
            memory.restart_process()
        return command(arguments)
    except BrokenPipeError:
        # `tpcore inspect ... | head`: nobody reads on. What is still buffered must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if arguments.traceback:
            traceback.print_exc()
        return report_error(_describe(error))
    except RuntimeError as error:
        if is_lost_rank(error):
            if arguments.traceback:
                traceback.print_exc()
            return report_lost_rank()
        if isinstance(error, StoppedError):
            return report_stopped(str(error), error.number)
        if not isinstance(error, DivergedError):
            raise
        return report_error(str(error), DIVERGED)


def _describe(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return (
            f"{error}; install tpcore with its extra [finetune], e.g. pip install '.[finetune]' "
            "in a checkout"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="tpcore", description="Tensor-parallel BERT: fine-tune, evaluate, convert."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    parser.add_argument(
        "--traceback", action="store_true", help="show the Python traceback of an error"
    )
    parser.set_defaults(restarts=False)
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="name", required=True
    )
    for family in (finetune, evaluate, report, convert, plan, doctor):
        family.add_commands(commands)

    arguments, rest = parser.parse_known_args(argv)
    of_command: Parser = commands.choices[arguments.name]
    # argparse gives up on positionals that follow an option; overrides may stand anywhere.
    if rest and arguments.name == "finetune" and not any(text.startswith("-") for text in rest):
        arguments.overrides += rest
    elif rest:
        of_command.refuse(rest)
    if arguments.name == "finetune" and not (arguments.config or arguments.help_config):
        of_command.error("the configuration file is missing")
    return arguments


class _Version(argparse.Action):
    def __call__(self, *_: Any) -> NoReturn:
        import tpcore

        print(f"tpcore {tpcore.__version__}")
        sys.exit(0)

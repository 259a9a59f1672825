"""What the commands share: the parser, types of arguments, options of several commands."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

Commands = Any
"""What `ArgumentParser.add_subparsers` returns; argparse has no public name for it."""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        from tpcore.train.launch import report_error

        sys.exit(report_error(f"{message}; see `{self.prog} --help`"))

    def refuse(self, rest: Sequence[str]) -> NoReturn:
        """End because of arguments that nobody asked for, with the option that was meant."""
        message = f"unrecognized arguments: {' '.join(rest)}"
        first = next((text for text in rest if text.startswith("-")), "")
        known = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(first.partition("=")[0], known, n=1)
        if near:
            message += f"; did you mean {near[0]}?"
        elif first and any(action.metavar == "key=value" for action in self._actions):
            message += "; settings are key=value without dashes, as model.optim.lr=5e-5"
        self.error(message)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, which of its checkpoints, on what."""
    parser.add_argument(
        "run",
        help="folder of a run, or one above it: then its newest run; its .nemo file; or, with "
        "--set, a checkpoint that has a head",
    )
    parser.add_argument(
        "--set",
        action="append",
        dest="settings",
        metavar="key=value",
        help="for a checkpoint that is no run, as in a configuration: task=question_answering",
    )
    parser.add_argument(
        "--checkpoint", default="best", metavar="NAME", help="best, last, or a file name"
    )
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N")
    parser.add_argument(
        "--max-tokens-per-batch",
        type=positive,
        metavar="N",
        help="batches of as many texts of similar length as have N tokens, not of --batch-size",
    )
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto")


def add_read_options(parser: argparse.ArgumentParser) -> None:
    """What a Megatron file does not say itself."""
    parser.add_argument(
        "--qkv-layout",
        choices=("v0", "v1", "v3"),
        help="order of the q/k/v rows, for a Megatron file that does not say",
    )
    parser.add_argument(
        "--config-file",
        "--bert_config",
        metavar="FILE",
        help="JSON with the sizes and switches of the encoder; must agree with the checkpoint",
    )
    parser.add_argument("--num-attention-heads", type=positive, metavar="N")
    parser.add_argument(
        "--vocab-size", type=positive, metavar="N", help="entries of the vocabulary, unpadded"
    )
    parser.add_argument("--gelu", choices=("none", "tanh", "erf_1.41421"))


def read_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_read_options` parsed, as arguments of tpcore.checkpoint."""
    options = {
        name: getattr(arguments, name)
        for name in ("qkv_layout", "config_file", "num_attention_heads", "vocab_size", "gelu")
    }
    return {name: value for name, value in options.items() if value is not None}


def positive(text: str) -> int:
    """An argument that is a number above 0."""
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def in_words(value: Any) -> str:
    """A value of some facts, for reading."""
    if isinstance(value, dict):
        return "; ".join(f"{name}: {in_words(part)}" for name, part in value.items() if part != {})
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)

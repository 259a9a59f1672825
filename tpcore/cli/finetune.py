"""tpcore finetune."""

from __future__ import annotations

import argparse
import os
import sys

from tpcore.cli.options import Commands, positive


def add_commands(commands: Commands) -> None:
    """Add `finetune` to the command line."""
    finetune = commands.add_parser(
        "finetune",
        help="fine-tune an encoder on a task",
        description="Fine-tune an encoder. Under torchrun it uses its ranks; with "
        "--nproc-per-node it starts them itself, after checking everything in one process.",
    )
    finetune.add_argument(
        "config", nargs="?", help="YAML file; not needed where key=value settings say it all"
    )
    finetune.add_argument("overrides", nargs="*", metavar="key=value", help="over the file")
    finetune.add_argument("--nproc-per-node", type=positive, metavar="N", help="start N ranks here")
    finetune.add_argument("--help-config", action="store_true", help="list all keys and exit")
    # Names of the oldest scripts for the same settings.
    for name, key in (("config", "config_file"), ("checkpoint", "lm_checkpoint")):
        finetune.add_argument(
            f"--bert_{name}", metavar="FILE", help=f"same as model.language_model.{key}=FILE"
        )
    finetune.set_defaults(command=_finetune, restarts=True)


def _finetune(arguments: argparse.Namespace) -> int:
    from tpcore.train.read_config import describe_keys, load_config

    if arguments.help_config:
        for key, default, doc in describe_keys():
            print(f"{key}={default}\n    {doc}")
        return 0
    from tpcore.train.launch import environment_int, is_under_torchrun, launch

    path, overrides = arguments.config, list(arguments.overrides)
    for name, key in (("bert_config", "config_file"), ("bert_checkpoint", "lm_checkpoint")):
        if getattr(arguments, name) is not None:
            overrides.append(f"model.language_model.{key}={getattr(arguments, name)}")
    if "=" in path and not os.path.exists(path):
        path, overrides = None, [path, *overrides]

    def note(line: str) -> None:
        if environment_int("RANK", 0) == 0:
            print(f"tpcore: note: {line}", file=sys.stderr)

    config = load_config(path, overrides, note)

    num_ranks = arguments.nproc_per_node
    if num_ranks is not None and is_under_torchrun():
        raise ValueError(
            "--nproc-per-node belongs to torchrun, which has already started the ranks"
        )
    if num_ranks is None or num_ranks == 1:
        from tpcore.train.finetune import finetune

        finetune(config)
        return 0
    from tpcore.train.prepare import prepare

    prepare(config, num_ranks)
    return launch(["finetune", *([path] if path else []), *overrides], num_ranks)

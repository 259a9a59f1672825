"""tpcore convert | inspect: checkpoints of any format."""

from __future__ import annotations

import argparse
import json

from tpcore.cli.options import Commands, add_read_options, in_words, positive, read_options


def add_commands(commands: Commands) -> None:
    """Add `convert` and `inspect` to the command line."""
    convert = commands.add_parser(
        "convert",
        help="rewrite a checkpoint in another format or at another size",
        description="Convert a checkpoint, or the best checkpoint of a run.",
    )
    convert.add_argument(
        "source", help="checkpoint of any format, name of a release, or folder of a run"
    )
    convert.add_argument("destination", help="folder to make; with --to nemo, the file")
    convert.add_argument(
        "--to", required=True, choices=("megatron", "megatron-core", "nemo", "huggingface")
    )
    convert.add_argument("--tensor-parallel-size", type=positive, default=1, metavar="N")
    convert.add_argument("--overwrite", action="store_true", help="replace a checkpoint there")
    add_read_options(convert)
    convert.set_defaults(command=_convert)

    inspect = commands.add_parser(
        "inspect", help="what a checkpoint holds", description="Show what a checkpoint holds."
    )
    inspect.add_argument(
        "path", help="checkpoint of any format, name of a release, or folder of a run"
    )
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    add_read_options(inspect)
    inspect.set_defaults(command=_inspect)


def _convert(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from tpcore import checkpoint
    from tpcore.train.run_folder import is_run

    if is_run(Path(arguments.source)):
        from tpcore.train.run import export_run

        info = export_run(
            arguments.source,
            arguments.destination,
            format=arguments.to,
            tensor_parallel_size=arguments.tensor_parallel_size,
            overwrite=arguments.overwrite,
        )
    else:
        info = checkpoint.convert(
            arguments.source,
            arguments.destination,
            to=arguments.to,
            tensor_parallel_size=arguments.tensor_parallel_size,
            overwrite=arguments.overwrite,
            **read_options(arguments),
        )
    print(
        f"{arguments.destination}: {info.format}, {info.num_parameters:,} parameters, "
        f"tensor-parallel size {info.tensor_parallel_size}"
    )
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from tpcore import checkpoint
    from tpcore.train.run_folder import is_run

    if is_run(Path(arguments.path)):
        from tpcore.train.run import describe_run

        facts = describe_run(Path(arguments.path))
        if arguments.json:
            print(json.dumps(facts, indent=2))
        else:
            width = max(map(len, facts))
            print("\n".join(f"{n:<{width}}  {in_words(v)}" for n, v in facts.items()))
        return 0
    info = checkpoint.inspect(arguments.path, **read_options(arguments))
    print(json.dumps(info.to_dict(), indent=2) if arguments.json else info)
    return 0

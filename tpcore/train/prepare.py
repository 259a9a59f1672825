"""Everything that can go wrong before training, checked in one process and without a process group.

`prepare` turns a configuration into a `Job`: tokenizer, task, data, the encoder's sizes, the
schedule. It reads a checkpoint's facts but not its weights, and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tpcore import checkpoint
from tpcore.checkpoint import CheckpointError, registry
from tpcore.checkpoint.state import check_tensor_parallel_size, check_vocabulary
from tpcore.checkpoint.stated import stated_config
from tpcore.models.bert import BertModel
from tpcore.models.config import BertConfig
from tpcore.models.heads import PreTrainingHead, build_head
from tpcore.models.vocabulary import grow_vocabulary
from tpcore.parallel.group import TensorParallelGroup
from tpcore.tasks import DataError, Dataset, Task, task_class
from tpcore.tasks.sections import DataConfig
from tpcore.tokenizer import SHIPPED, WordPieceTokenizer
from tpcore.train.batching import num_batches, overlong_notes
from tpcore.train.config import (
    CheckpointCallbackConfig,
    ConfigError,
    EarlyStoppingConfig,
    ModelConfig,
    TrainConfig,
)
from tpcore.train.launch import check_num_threads
from tpcore.train.precision import precision_of
from tpcore.train.run_state import choose_run
from tpcore.train.schedule import Schedule

# Read from the shapes in a checkpoint; a configuration may repeat them, not change them.
_SIZES = (
    "hidden_size",
    "num_layers",
    "intermediate_size",
    "max_position_embeddings",
    "num_token_types",
)


@dataclass(frozen=True)
class Job:
    """A checked configuration and what it needs."""

    config: TrainConfig
    task: Task
    encoder: BertConfig
    checkpoint: Path | None
    """None: the encoder starts from random weights."""
    has_same_head: bool
    """Whether the checkpoint has a head of this kind, which is left aside: it has other labels."""
    overrides: Mapping[str, Any]
    """Fields of BertConfig that the configuration sets and the checkpoint does not."""
    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    tensor_parallel_size: int
    steps_per_epoch: int
    schedule: Schedule
    monitor: tuple[str, str]
    """Metric that chooses the best checkpoint, as `val_accuracy`, and "max" or "min"."""
    stopping_monitor: tuple[str, str]
    """The same for the one that early stopping watches."""
    notes: tuple[str, ...]
    """What a user should hear before the run begins."""
    new_tokens: tuple[tuple[int, ...], ...] = ()
    """The pieces, until now, of each token that the task adds to the vocabulary."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.schedule.max_steps


def prepare(config: TrainConfig, num_ranks: int = 1) -> Job:
    """Check `config` against its files for a run on `num_ranks` ranks.

    Raises:
        ValueError: ConfigError, CheckpointError or DataError; says what to change.
    """
    model = config.model
    tp_size = model.tensor_model_parallel_size or num_ranks
    if num_ranks % tp_size:
        raise ConfigError(
            f"model.tensor_model_parallel_size={tp_size} does not divide the {num_ranks} rank(s); "
            f"use {_divisors(num_ranks)}, or start a multiple of {tp_size} ranks"
        )
    check_num_threads(config.trainer.num_threads)
    choose_run(config.exp_manager)
    path = checkpoint_path(model)
    overrides = encoder_overrides(model)
    info = None
    if path is not None:
        sizes = {name: overrides.pop(name) for name in _SIZES if name in overrides}
        info = checkpoint.inspect(path, **overrides)
        _check_sizes(sizes, info.config, path)
    tokenizer = find_tokenizer(model, path)
    if info is None:
        try:
            encoder = BertConfig.from_dict({"vocab_size": tokenizer.vocab_size, **overrides})
        except ValueError as error:
            raise ConfigError(f"model.language_model.config: {error}") from error
        start = "no checkpoint: the encoder starts from random weights"
    else:
        assert path is not None
        encoder = info.config.replace(vocab_size=tokenizer.vocab_size, padded_vocab_size=None)
        stated = info.config.vocab_size
        check_vocabulary(tokenizer.vocab_size, info.vocab_rows, str(path), stated)
        start = f"encoder from {path} ({info.format}, {info.tensor_parallel_size} rank(s))"
    check_tensor_parallel_size(encoder, tp_size)
    if model.dataset.max_seq_length > encoder.max_position_embeddings:
        raise ConfigError(
            f"model.dataset.max_seq_length={model.dataset.max_seq_length} exceeds the encoder's "
            f"{encoder.max_position_embeddings} positions; use at most that"
        )

    source = model.source("train_ds")
    if source is None:
        key = f"model.train_ds.{model.file_key}"
        raise ConfigError(f"no value for {key}; pass {key}=...")
    task = task_class(config.task).create(model, tokenizer, source)
    added = task.tokenizer.vocabulary[tokenizer.vocab_size :]
    new_tokens = tuple(tuple(tokenizer.encode(token).ids[1:-1]) for token in added)
    keeps_head = task.head_name == "pretraining" and info is not None and info.head == "pretraining"
    needs_pooler = task.head_name == "sequence_classification" or task.head_kwargs().get("binary")
    if needs_pooler and overrides.get("add_pooler") is False:
        raise ConfigError(
            "model.language_model.config has add_pooler=False, but a classifier of texts works "
            "on the pooler; remove it"
        )
    train = _load(task, model, "train_ds")
    assert train is not None
    validation = _load(task, model, "validation_ds")
    test = _load(task, model, "test_ds")

    batches = num_batches(train.examples, model.train_ds)
    steps_per_epoch = math.ceil(batches / config.trainer.accumulate_grad_batches)
    head = ", ".join(f"{name}={value}" for name, value in task.head_kwargs().items())
    kind = "the checkpoint's head" if keeps_head else "new head"
    notes = [start, f"{kind}: {task.head_name} ({head})"]
    if added:
        notes.append(f"{len(added)} tokens added to the vocabulary: {' '.join(added)}")
    for part, dataset in (("train_ds", train), ("validation_ds", validation), ("test_ds", test)):
        if dataset is not None:
            notes.append(f"{dataset.source}: {len(dataset.examples)} examples")
            notes += dataset.notes
            notes += overlong_notes(dataset.examples, getattr(model, part), f"model.{part}")
    if validation is None:
        notes.append("no validation data: only the last checkpoint is kept")
    return Job(
        config=config,
        task=task,
        encoder=encoder,
        checkpoint=path,
        has_same_head=info is not None and info.head == task.head_name,
        overrides=overrides,
        train=train,
        validation=validation,
        test=test,
        tensor_parallel_size=tp_size,
        steps_per_epoch=steps_per_epoch,
        schedule=_schedule(config, steps_per_epoch),
        monitor=_monitor(config.exp_manager.checkpoint_callback_params, task),
        stopping_monitor=_stopping_monitor(config, task),
        notes=tuple(notes),
        new_tokens=new_tokens,
    )


def build_model(job: Job, tp: TensorParallelGroup, device: torch.device) -> BertModel:
    """The encoder with a new head, equal weights for equal seeds at every size; fp32.

    Raises:
        CheckpointError: a file turns out to be damaged.
        ConfigError: the model does not fit into memory.
    """
    try:
        model = _build_model(job, tp, device)
        if job.new_tokens:
            grow_vocabulary(model, job.new_tokens)
        if job.config.trainer.compile:
            model.compile_encoder()
        return model
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and (
            "allocate memory" not in str(error)
        ):
            raise
        sizes = ", ".join(f"{name}={getattr(job.encoder, name)}" for name in _SIZES)
        raise ConfigError(f"there is not enough memory for a model of {sizes}") from error


def _build_model(job: Job, tp: TensorParallelGroup, device: torch.device) -> BertModel:
    head, kwargs = job.task.head_name, job.task.head_kwargs()
    config, trainer = job.config.model, job.config.trainer
    options: dict[str, Any] = {
        "sequence_parallel": config.sequence_parallel,
        "activation_checkpointing": config.activations_checkpoint_granularity,
        # Where weights are not float32, the layers' own gradients are on CUDA, whose products give
        # float32 at once; elsewhere `Weights` sums them, and FSDP2 sees to that itself.
        "accumulate_main_grad": precision_of(trainer.precision).weights != torch.float32
        and trainer.data_parallel == "sum"
        and device.type == "cuda",
    }
    torch.manual_seed(job.config.trainer.seed)
    if job.checkpoint is None:
        model = BertModel(job.encoder, tp=tp, device=device, dtype=torch.float32, **options)
    else:
        options |= {"vocab_size": job.encoder.vocab_size, **job.overrides}
        # A file's own head of this kind is of another task with other labels: leave it there. Only
        # words are the same everywhere.
        keeps = job.has_same_head and head == "pretraining"
        if keeps:
            options["head"] = head
        else:
            options |= (
                {"head": None} if job.has_same_head else {"head": head, "head_kwargs": kwargs}
            )
        model = checkpoint.load(
            job.checkpoint, tp=tp, device=device, dtype=torch.float32, **options
        )
        if not job.has_same_head:
            return model
        if keeps:
            assert isinstance(model.head, PreTrainingHead)
            own = model.head
            model.head = PreTrainingHead(model.config, tp=tp, device=device, **kwargs)
            model.head.lm = own.lm
            if own.binary is not None and model.head.binary is not None:
                model.head.binary = own.binary
            if model.head.binary is not None and model.pooler is None:
                raise ConfigError(
                    f"{job.checkpoint} has no pooler, which a sentence loss works on; use "
                    "model.dataset.sentence_loss=null"
                )
            return model
    model.head = build_head(head, model.config, tp=tp, device=device, dtype=torch.float32, **kwargs)
    return model


def checkpoint_path(model: ModelConfig) -> Path | None:
    """The checkpoint that the configuration names; None: it asks for random weights.

    Raises:
        ConfigError: nothing says what the encoder is.
        CheckpointError: it is named, but neither there nor to be downloaded.
    """
    language_model = model.language_model
    if language_model.lm_checkpoint:
        path = Path(language_model.lm_checkpoint)
        if not path.exists():
            raise ConfigError(
                f"model.language_model.lm_checkpoint={str(path)!r} does not exist; relative paths "
                f"start at {Path.cwd()}"
            )
        return path
    name = language_model.pretrained_model_name
    if name:
        return registry.locate(name)
    if language_model.config_file or language_model.config:
        return None
    raise ConfigError(
        "nothing says which encoder to start from; pass model.language_model.lm_checkpoint=..., or "
        "model.language_model.config={hidden_size: ..., ...} for random weights"
    )


def encoder_overrides(model: ModelConfig) -> dict[str, Any]:
    """Fields of BertConfig from `config_file`, else from `config`, as `stated_config` reads them.

    Raises:
        ConfigError: unreadable file, unknown name.
    """
    language_model = model.language_model
    try:
        stated = stated_config(language_model.config_file, language_model.config or None)
    except CheckpointError as error:
        raise ConfigError(f"model.language_model: {error}") from error
    return {} if stated is None else dict(stated.fields)


def find_tokenizer(model: ModelConfig, path: Path | None) -> WordPieceTokenizer:
    """The tokenizer of the configuration, else the one beside the checkpoint, else by name.

    Raises:
        ConfigError: there is none.
        ValueError: it cannot be read.
    """
    settings = model.tokenizer
    lowercase = settings.do_lower_case
    for name in (settings.tokenizer_name, model.language_model.pretrained_model_name):
        if lowercase is None and name and name.endswith(("-cased", "-uncased")):
            lowercase = name.endswith("-uncased")
    if settings.vocab_file:
        return WordPieceTokenizer.from_file(settings.vocab_file, lowercase=lowercase)
    folder = path if path is not None and path.is_dir() else path and path.parent
    for place in [folder, *list(folder.parents)[:2]] if folder else []:
        if (place / "vocab.txt").is_file() or (place / "tokenizer.json").is_file():
            return WordPieceTokenizer.from_file(place, lowercase=lowercase)
    for name in (settings.tokenizer_name, model.language_model.pretrained_model_name):
        if name and name in SHIPPED:
            return WordPieceTokenizer.from_name(name, lowercase=lowercase)
        vocabulary = name and registry.fetch_vocabulary(name)
        if vocabulary:
            return WordPieceTokenizer.from_file(vocabulary, lowercase=lowercase)
    beside = f" and none lies beside {path}" if path is not None else ""
    raise ConfigError(
        f"no vocabulary: model.tokenizer.vocab_file is null{beside}; pass "
        "model.tokenizer.vocab_file=..., or as model.tokenizer.tokenizer_name one of "
        f"{', '.join(SHIPPED)}"
    )


def _check_sizes(sizes: Mapping[str, Any], config: BertConfig, path: Path) -> None:
    for name, value in sizes.items():
        found = getattr(config, name)
        if value != found:
            raise ConfigError(
                f"model.language_model.config has {name}={value!r}, but {path} has {found}; remove "
                "it, or use the checkpoint that belongs to this configuration"
            )


def _load(task: Task, model: ModelConfig, part: str) -> Dataset | None:
    source = model.source(part)
    if source is None:
        return None
    data: DataConfig = getattr(model, part)
    dataset = task.load(source, num_samples=data.num_samples)
    if not dataset.examples:
        raise DataError(f"{dataset.source} (model.{part}) holds no examples")
    return dataset


def _schedule(config: TrainConfig, steps_per_epoch: int) -> Schedule:
    optim, trainer = config.model.optim, config.trainer
    steps = steps_per_epoch * trainer.max_epochs
    if trainer.max_steps != -1:
        steps = min(steps, trainer.max_steps)
    warmup = optim.sched.warmup_steps or int((optim.sched.warmup_ratio or 0.0) * steps)
    if warmup > steps:
        raise ConfigError(
            f"model.optim.sched.warmup_steps={warmup} exceeds the {steps} steps of the run; use "
            "fewer, or warmup_ratio"
        )
    return Schedule(
        name=optim.sched.name,
        lr=optim.lr,
        max_steps=steps,
        warmup_steps=warmup,
        min_lr=optim.sched.min_lr,
        power=optim.sched.power,
    )


def _stopping_monitor(config: TrainConfig, task: Task) -> tuple[str, str]:
    params = config.exp_manager.early_stopping_callback_params
    if params.monitor is None:
        metric, mode = _monitor(config.exp_manager.checkpoint_callback_params, task)
        return metric, params.mode or mode
    return _monitor(params, task)


def _monitor(params: CheckpointCallbackConfig | EarlyStoppingConfig, task: Task) -> tuple[str, str]:
    metric, mode = task.monitor
    if params.monitor is not None:
        metric = params.monitor.removeprefix("val_")
        if metric != task.monitor.metric:
            mode = "min" if metric == "loss" else "max"
    return f"val_{metric}", params.mode or mode


def _divisors(number: int) -> str:
    divisors = [str(d) for d in range(1, number + 1) if number % d == 0]
    return " or ".join([", ".join(divisors[:-1]), divisors[-1]] if divisors[1:] else divisors)

"""The configuration of a run: dataclasses that name and document every key.

Keys have the names that NeMo users know. Relative paths are relative to the working directory.
`read_config.load_config` makes a `TrainConfig` from a file and overrides. No torch here.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from typing import Any

from omegaconf import MISSING

from tpcore.tasks.sections import TaskSections
from tpcore.tasks.settings import SECTIONS
from tpcore.train.schedule import SCHEDULES

PRECISIONS = ("32", "bf16-mixed", "bf16", "16-mixed", "16", "32-true", "bf16-true")
"""Of `trainer.precision`; the last three are other names of the first, third and fourth."""


class ConfigError(ValueError):
    """A configuration that cannot be used; one line that says what, where and what to do."""


@dataclass
class LanguageModelConfig:
    """model.language_model: the encoder to start from."""

    pretrained_model_name: str | None = None
    """A checkpoint folder, or a released encoder, downloaded once (docs/checkpoints.md)."""
    lm_checkpoint: str | None = None
    """Checkpoint to start from: any file or folder that `tpcore inspect` reads."""
    config_file: str | None = None
    """JSON file with the sizes of the encoder, for checkpoints that do not hold them."""
    config: dict[str, Any] | None = None
    """The same as a mapping; without a checkpoint the encoder starts from random weights."""


@dataclass
class TokenizerConfig:
    """model.tokenizer: how text becomes tokens."""

    tokenizer_name: str | None = None
    """megatron-bert-uncased or -cased: the vocabulary in the package, if there is no other."""
    vocab_file: str | None = None
    """Vocab.txt, one token a line; null: the one that lies beside the checkpoint."""
    do_lower_case: bool | None = None
    """Lower the case of the text; null: as the vocabulary."""


@dataclass
class SchedConfig:
    """model.optim.sched: the learning rate over time; formulas in `schedule`."""

    name: str = "WarmupAnnealing"
    """WarmupAnnealing (linear fall), CosineAnnealing, SquareRootAnnealing,
    PolynomialDecayAnnealing, InverseSquareRootAnnealing or constant."""
    warmup_steps: int | None = None
    """Steps of linear warm-up."""
    warmup_ratio: float | None = None
    """The same as a fraction of all steps; not both."""
    min_lr: float = 0.0
    """The learning rate does not fall below this."""
    power: float = 1.0
    """Exponent of PolynomialDecayAnnealing."""


@dataclass
class OptimConfig:
    """model.optim: how weights follow gradients."""

    name: str = "adamw"
    """`adamw`; `adam`: weight decay added to the gradient; `fused_adam`: AdamW of NVIDIA apex."""
    lr: float = 5e-5
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of the two moments."""
    weight_decay: float = 0.01
    """Of matrices and embeddings; norms and biases have none."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    layerwise_lr_decay: float = 1.0
    """Each block learns this much slower than the one above it; 1: all alike."""
    sched: SchedConfig = field(default_factory=SchedConfig)


@dataclass
class ModelConfig(TaskSections):
    """model: encoder, data and optimizer; the sections of a task are in `tasks.settings`."""

    tensor_model_parallel_size: int | None = None
    """Ranks over which each layer is split; null: all of them."""
    sequence_parallel: bool = False
    """Split the tokens over the same ranks wherever layers are not: less memory, same results."""
    activations_checkpoint_granularity: str | None = None
    """`full` or `selective`: compute activations again in the backward; null: keep them."""
    frozen_parameters: list[str] = field(default_factory=list)
    """Patterns of names that are not trained, as [embeddings.*, blocks.0.*]."""
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass
class TrainerConfig:
    """trainer: the training loop and the machine."""

    max_epochs: int = 3
    """Passes over the training data."""
    max_steps: int = -1
    """Stop after so many optimizer steps; -1: by max_epochs alone."""
    accumulate_grad_batches: int = 1
    """Batches whose gradients make one optimizer step."""
    gradient_clip_val: float | None = 1.0
    """Largest global gradient norm; null: no clipping."""
    data_parallel: str = "sum"
    """How gradients meet: `sum`, at the end of a step; `ddp`, while the backward still runs;
    `fsdp2`: likewise, and each rank keeps its rows of weights and moments alone."""
    precision: str = "32"
    """32; bf16-mixed or 16-mixed: 16-bit arithmetic on fp32 weights, float16 with loss scaling;
    bf16: bfloat16 weights, of which the optimizer keeps fp32 copies."""
    compile: bool = False
    """Run the encoder as one graph of torch.compile, on a CPU (docs/compile.md: when it helps)."""
    loss_scale: float = 65536.0
    """Of 16-mixed, to begin with; halved when gradients overflow."""
    loss_scale_window: int = 1000
    """Steps without overflow after which the loss scale is doubled."""
    val_check_interval: float = 1.0
    """Validate after this fraction of an epoch; above 1: after so many optimizer steps."""
    log_every_n_steps: int = 10
    """A line in metrics.jsonl and on the console every n steps."""
    seed: int = 1234
    """Of initialisation, data order and dropout."""
    accelerator: str = "auto"
    """`auto`, `cpu` or `gpu`."""
    num_threads: int | None = None
    """CPU threads of each rank; null: cores / ranks."""
    enable_progress_bar: bool = True
    """A progress bar where the console is a terminal."""
    peak_tflops: float | None = None
    """What model FLOP utilisation is relative to, of one rank's device; null: the speed of a matrix
    product, measured at the start; 0: show no utilisation."""
    timeout_s: float = 600.0
    """How long ranks wait for each other; a rank that hangs is named well before."""


@dataclass
class CheckpointCallbackConfig:
    """exp_manager.checkpoint_callback_params: which checkpoints are kept."""

    monitor: str | None = None
    """Metric that chooses the best; null: the metric of the task."""
    mode: str | None = None
    """`max` or `min`; null: what suits the metric."""
    save_top_k: int = 1
    """How many of the best checkpoints to keep; 0: none."""
    save_last: bool = True
    """Keep <name>-last.ckpt, rewritten after each validation."""
    save_nemo_on_train_end: bool = True
    """End with checkpoints/<name>.nemo: the best weights with head, labels and vocabulary."""
    every_n_train_steps: int | None = None
    """Rewrite <name>-last.ckpt after so many steps too, for epochs that take hours."""


@dataclass
class EarlyStoppingConfig:
    """exp_manager.early_stopping_callback_params: when more training does not help."""

    monitor: str | None = None
    """Metric to watch; null: the one that chooses the best checkpoint."""
    mode: str | None = None
    """`max` or `min`; null: what suits the metric."""
    patience: int = 3
    """Validations without improvement after which the run ends."""
    min_delta: float = 0.0
    """What counts as an improvement."""


@dataclass
class ExpManagerConfig:
    """exp_manager: where the run goes, `<exp_dir>/<name>/<version>`."""

    exp_dir: str = "runs"
    """Folder of all runs."""
    name: str = "default"
    """Name of the experiment: a folder, and the start of file names."""
    version: str | None = None
    """Folder of this run; null: date and time of its start."""
    resume_if_exists: bool = False
    """Go on with the run of this version; without a version: with the newest unfinished one."""
    create_tensorboard_logger: bool = True
    """Write event files for TensorBoard beside metrics.jsonl."""
    create_early_stopping_callback: bool = False
    """End the run when the metric no longer improves."""
    early_stopping_callback_params: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    checkpoint_callback_params: CheckpointCallbackConfig = field(
        default_factory=CheckpointCallbackConfig
    )


@dataclass
class TrainConfig:
    """All keys of `tpcore finetune`."""

    task: str = MISSING
    """What is learnt: text_classification, token_classification, question_answering, ...;
    docs/tasks.md has them all."""
    model: ModelConfig = field(default_factory=ModelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)


@functools.cache
def config_class(task: str) -> type[TrainConfig]:
    """`TrainConfig` with the sections of a task in its `model`.

    The classes are attributes of this module, so that configurations pickle.
    """
    sections = SECTIONS[task]
    prefix = sections.__name__.removesuffix("Sections")
    model = make_dataclass(f"{prefix}ModelConfig", [], bases=(sections, ModelConfig))
    whole = make_dataclass(
        f"{prefix}TrainConfig",
        [("model", model, field(default_factory=model))],
        bases=(TrainConfig,),
    )
    for cls in (model, whole):
        cls.__module__ = __name__
        globals()[cls.__name__] = cls
    return whole


for _task in SECTIONS:
    config_class(_task)


def shown_source(key: str, sources: Mapping[str, str]) -> str:
    """` (place)` where `key` was set, for messages; empty where it has its default."""
    return f" ({sources[key]})" if key in sources else ""


def check_values(config: TrainConfig, sources: Mapping[str, str]) -> None:
    """Ranges and choices; what depends on data or checkpoint is checked where they are read."""
    model, trainer, optim = config.model, config.trainer, config.model.optim
    params = config.exp_manager.checkpoint_callback_params

    def check(ok: bool, key: str, expected: str) -> None:
        if not ok:
            value: Any = config
            for name in key.split("."):
                value = getattr(value, name)
            raise ConfigError(f"{key}={value!r}{shown_source(key, sources)}: expected {expected}")

    def one_of(key: str, value: Any, choices: Sequence[Any]) -> None:
        near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        shown = ", ".join("null" if choice is None else str(choice) for choice in choices)
        check(value in choices, key, f"one of {shown}{hint}")

    one_of("task", config.task, tuple(SECTIONS))
    tp_size = model.tensor_model_parallel_size
    check(tp_size is None or tp_size > 0, "model.tensor_model_parallel_size", "a positive number")
    for ok, key, expected in model.rules():
        check(ok, f"model.{key}", expected)
    one_of("model.optim.name", optim.name, ("adamw", "adam", "fused_adam"))
    check(0 < optim.lr < math.inf, "model.optim.lr", "a positive number")
    check(
        len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas),
        "model.optim.betas",
        "two numbers in [0, 1)",
    )
    decay = optim.weight_decay
    check(0 <= decay < math.inf, "model.optim.weight_decay", "zero or a positive number")
    check(0 < optim.eps < math.inf, "model.optim.eps", "a positive number")
    check(0 < optim.sched.power < math.inf, "model.optim.sched.power", "a positive number")
    check(0 < optim.layerwise_lr_decay <= 1, "model.optim.layerwise_lr_decay", "a number in (0, 1]")
    one_of(
        "model.activations_checkpoint_granularity",
        model.activations_checkpoint_granularity,
        (None, "full", "selective"),
    )
    one_of("model.optim.sched.name", optim.sched.name, tuple(SCHEDULES))
    if optim.sched.warmup_steps is not None and optim.sched.warmup_ratio is not None:
        raise ConfigError("model.optim.sched has both warmup_steps and warmup_ratio; give one")
    steps, ratio = optim.sched.warmup_steps, optim.sched.warmup_ratio
    check(steps is None or steps >= 0, "model.optim.sched.warmup_steps", "zero or more steps")
    check(
        ratio is None or 0 <= ratio <= 1, "model.optim.sched.warmup_ratio", "a fraction of 0 to 1"
    )
    check(
        0 <= optim.sched.min_lr <= optim.lr,
        "model.optim.sched.min_lr",
        f"a number from 0 to model.optim.lr={optim.lr}",
    )
    check(trainer.max_epochs > 0, "trainer.max_epochs", "a positive number")
    check(
        trainer.max_steps > 0 or trainer.max_steps == -1,
        "trainer.max_steps",
        "a positive number of steps, or -1 for no limit",
    )
    check(trainer.accumulate_grad_batches > 0, "trainer.accumulate_grad_batches", "at least 1")
    clip = trainer.gradient_clip_val
    check(clip is None or clip > 0, "trainer.gradient_clip_val", "a positive number, or null")
    one_of("trainer.precision", trainer.precision, PRECISIONS)
    check(
        not (trainer.compile and trainer.precision in ("bf16", "bf16-true")),
        "trainer.compile",
        "false with trainer.precision=bf16, or trainer.precision=bf16-mixed",
    )
    check(
        not (trainer.compile and model.activations_checkpoint_granularity == "full"),
        "trainer.compile",
        "false with model.activations_checkpoint_granularity=full, or that to be selective",
    )
    one_of("trainer.data_parallel", trainer.data_parallel, ("sum", "ddp", "fsdp2"))
    check(
        not (trainer.compile and trainer.data_parallel == "fsdp2"),
        "trainer.compile",
        "false with trainer.data_parallel=fsdp2, or that to be ddp",
    )
    check(0 < trainer.loss_scale < 2**32, "trainer.loss_scale", "a positive number below 2**32")
    check(trainer.loss_scale_window > 0, "trainer.loss_scale_window", "a positive number of steps")
    check(1 <= trainer.timeout_s <= 1e6, "trainer.timeout_s", "at least 1 second, at most 1e6")
    interval = trainer.val_check_interval
    check(
        0 < interval <= 1 or (interval > 1 and interval == int(interval)),
        "trainer.val_check_interval",
        "a fraction of an epoch, or a whole number of steps above 1",
    )
    check(0 <= trainer.seed < 2**63, "trainer.seed", "a number from 0 to 2**63 - 1")
    check(trainer.log_every_n_steps > 0, "trainer.log_every_n_steps", "a positive number of steps")
    one_of("trainer.accelerator", trainer.accelerator, ("auto", "cpu", "gpu"))
    check(
        trainer.num_threads is None or trainer.num_threads > 0,
        "trainer.num_threads",
        "a positive number of threads, or null",
    )
    peak = trainer.peak_tflops
    check(
        peak is None or 0 <= peak < math.inf,
        "trainer.peak_tflops",
        "a number of 10^12 operations per second, 0 for none, or null",
    )
    one_of("exp_manager.checkpoint_callback_params.mode", params.mode, (None, "max", "min"))
    every = params.every_n_train_steps
    check(
        every is None or every > 0,
        "exp_manager.checkpoint_callback_params.every_n_train_steps",
        "a positive number of steps, or null",
    )
    stopping = config.exp_manager.early_stopping_callback_params
    one_of("exp_manager.early_stopping_callback_params.mode", stopping.mode, (None, "max", "min"))
    check(
        stopping.patience > 0,
        "exp_manager.early_stopping_callback_params.patience",
        "a positive number of validations",
    )
    check(
        stopping.min_delta >= 0,
        "exp_manager.early_stopping_callback_params.min_delta",
        "zero or a positive number",
    )
    check(
        params.save_top_k >= 0,
        "exp_manager.checkpoint_callback_params.save_top_k",
        "zero or a positive number",
    )
    for key, text in (
        ("exp_manager.name", config.exp_manager.name),
        ("exp_manager.version", config.exp_manager.version),
    ):
        check(
            text is None
            or (
                0 < len(text.encode()) <= 128
                and text.isprintable()
                and "/" not in text
                and text not in (".", "..")
            ),
            key,
            "a name of at most 128 bytes without / and without control characters",
        )

"""What a training step costs, from sizes alone: products, bytes moved, messages, memory.

Counted per rank, for a model split over tp tensor-parallel ranks and repeated dp times. Letters as
everywhere: h hidden, f feed-forward, n heads, t packed tokens of one replica, s mean keys a token
attends to; e bytes of a number of the forward. An estimate of time is a sum of four terms, each
work over a measured speed of the device; nothing is taken to overlap, so it bounds from above what
overlap can still win:

    products       floating-point operations / matrix speed
    other kernels  bytes read and written    / copy speed
    collectives    bytes sent / link speed + messages * latency
    optimizer      bytes read and written    / copy speed

Products of one layer and token, forward (a multiplication and an addition are two operations):

    2 (4 h^2 + 2 h f) / tp        the four linear layers
    4 s h / tp                    scores and context

and twice that backward; attention computes its scores again there (2.5 times). Activation bytes are
counted, not estimated: a test compares `activation_bytes` with what autograd saves. The count of
arXiv 2205.05198, equation 2, for a layer in half precision is s b h (34 + 5 n s / h): dropout masks
in bytes and the [s, s] matrices that the kernels here do not keep make the difference.

No torch here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tpcore.models.config import BertConfig, padded_vocab_size_for

Precision: TypeAlias = Literal["32", "bf16-mixed", "bf16"]
Checkpointing: TypeAlias = Literal["full", "selective"] | None

PRECISIONS: tuple[Precision, ...] = ("32", "bf16-mixed", "bf16")


@dataclass(frozen=True, kw_only=True)
class Device:
    """Measured speeds of one rank's device; `benchmarks/` measures them.

    Attributes:
        matrix_flops_per_s: of the best matrix product in the dtype of the forward.
        copy_bytes_per_s: of a copy, bytes read plus bytes written.
        memory_bytes: what a rank may use.
        link_bytes_per_s: what a rank sends to another one of its host.
        link_latency_s: of one such message.
        ranks_per_host: beyond it, messages cross the network.
        network_bytes_per_s: what a rank sends to another host.
        network_latency_s: of one such message.
    """

    matrix_flops_per_s: float
    copy_bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float
    link_latency_s: float = 10e-6
    ranks_per_host: int = 8
    network_bytes_per_s: float = 12.5e9
    network_latency_s: float = 30e-6

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name}={value!r} is not positive; give a measured value")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a step is laid out over ranks.

    Attributes:
        tokens: packed tokens of one replica in one step, t.
        mean_keys: how many keys a token attends to on average, s; for sequences of lengths l_i it
            is sum l_i^2 / sum l_i.
        tensor_parallel_size: tp.
        data_parallel_size: dp.
        sequence_parallel: norms, dropout and residuals on t/tp tokens.
        activation_checkpointing: "full", "selective" or None, as TransformerBlock.
        precision: "32"; "bf16-mixed", bfloat16 arithmetic on fp32 weights; "bf16", bfloat16
            weights with fp32 main weights and gradients in the optimizer.
        predicted_tokens: tokens of a replica that go through the vocabulary (masked-LM), 0 for a
            downstream task.
        last_block_tokens: tokens of a replica that the last block computes behind its attention,
            where a head reads no others; None: all.
    """

    tokens: int
    mean_keys: float
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    sequence_parallel: bool = False
    activation_checkpointing: Checkpointing = None
    precision: Precision = "bf16-mixed"
    predicted_tokens: int = 0
    last_block_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "mean_keys", "tensor_parallel_size", "data_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is below 1")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision={self.precision!r} is unknown; use one of {', '.join(PRECISIONS)}"
            )

    @property
    def ranks(self) -> int:
        return self.tensor_parallel_size * self.data_parallel_size

    @property
    def number_bytes(self) -> int:
        """Of one number of the forward, e."""
        return 4 if self.precision == "32" else 2

    @property
    def norm_shares(self) -> int:
        """Over how many ranks the tokens of norms, dropout and residuals are split."""
        return self.tensor_parallel_size if self.sequence_parallel else 1


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, term by term."""

    products_s: float
    kernels_s: float
    collectives_s: float
    data_parallel_s: float
    optimizer_s: float

    @property
    def total_s(self) -> float:
        return sum(vars(self).values())


def parameters_of_rank(config: BertConfig, tp_size: int = 1) -> int:
    """Parameters that one of `tp_size` ranks holds: encoder, final norm and pooler, no head."""
    h, f = config.hidden_size, config.feed_forward_size
    vocabulary = config.padded_vocab_size or padded_vocab_size_for(config.vocab_size, tp_size)
    split = (4 * h * h + 3 * h) + (2 * h * f + f)
    replicated = 2 * h + 4 * h
    embeddings = vocabulary * h // tp_size
    embeddings += (config.max_position_embeddings + config.num_token_types) * h
    pooler = h * h + h if config.add_pooler else 0
    return config.num_layers * (split // tp_size + replicated) + embeddings + 2 * h + pooler


def activation_bytes(config: BertConfig, layout: Layout) -> int:
    """Bytes that one layer keeps for its backward on one rank, with the fused kernels.

    Without checkpointing, of each token:

        the inputs of two norms and of two column-parallel layers     4 h e    (/tp with sequence
        the means and inverse deviations of the norms, fp32           16        parallelism)
        one bit an element of two dropouts, on a CPU only             h / 4
        q, k and v; the context; both sides of the GeLU               (4 h + 2 f) e / tp
        maximum and sum of each query's scores, fp32                  8 n / tp

    and under bf16-mixed the norms' inputs are fp32 and bfloat16 copies of the weights are kept, 2
    bytes a number. Attention computes its dropout mask and probabilities again. "selective" saves
    nothing beyond that here, where attention never keeps its probabilities; "full" keeps the input
    of the layer alone.
    """
    h, f, t = config.hidden_size, config.feed_forward_size, layout.tokens
    e, tp = layout.number_bytes, layout.tensor_parallel_size
    residual_bytes = 2 if layout.precision == "bf16" else 4
    own_tokens = t // layout.norm_shares
    if layout.activation_checkpointing == "full":
        return own_tokens * h * residual_bytes
    dropout_bits = 2 * ((h + 7) // 8)
    norms = own_tokens * (2 * h * residual_bytes + 2 * h * e + 16 + dropout_bits)
    split = t * ((4 * h + 2 * f) * e + 8 * config.num_attention_heads) // tp
    weights = 2 * (4 * h * h + 2 * h * f) // tp if layout.precision == "bf16-mixed" else 0
    return norms + split + weights


def memory_of_rank(config: BertConfig, layout: Layout) -> Memory:
    """Weights, gradients, AdamW's state and activations of one rank."""
    parameters = parameters_of_rank(config, layout.tensor_parallel_size)
    low = layout.precision == "bf16"
    layers = config.num_layers * activation_bytes(config, layout)
    if layout.activation_checkpointing == "full":
        # One layer at a time is computed again, and kept while its backward runs.
        again = Layout(**{**vars(layout), "activation_checkpointing": None})
        layers += activation_bytes(config, again)
    return Memory(
        weights=parameters * (2 if low else 4),
        gradients=parameters * 4,
        optimizer=parameters * (12 if low else 8),
        activations=layers,
    )


def step_flops(config: BertConfig, layout: Layout) -> float:
    """Floating-point operations of the products of one step on one rank."""
    h, f, t, tp = (
        config.hidden_size,
        config.feed_forward_size,
        layout.tokens,
        layout.tensor_parallel_size,
    )
    behind = 2.0 * (h * h + 2 * h * f) / tp  # of a token: the products behind attention
    last = t if layout.last_block_tokens is None else layout.last_block_tokens
    linear = config.num_layers * t * (2.0 * 3 * h * h / tp + behind) - (t - last) * behind
    attention = config.num_layers * 4.0 * t * layout.mean_keys * h / tp
    again = linear + attention if layout.activation_checkpointing == "full" else 0.0
    layers = 3 * linear + 3.5 * attention + again
    vocabulary = padded_vocab_size_for(config.vocab_size, tp)
    return layers + 6.0 * layout.predicted_tokens * h * (vocabulary / tp + h)


def step_kernel_bytes(config: BertConfig, layout: Layout) -> float:
    """Bytes that all other kernels of the layers read and write in one step on one rank.

    Of each token, in numbers: the norms read and write 2 h each forward, 3 h backward; bias,
    dropout and residual 3 h and 2 h; where the residual branches, two gradients become one, 3 h,
    twice; the GeLU 2 f / tp forward and 3 f / tp backward.
    """
    h, f, t = config.hidden_size, config.feed_forward_size, layout.tokens
    tp, e = layout.tensor_parallel_size, layout.number_bytes
    forward = 10 * h / layout.norm_shares + 2 * f / tp
    backward = 16 * h / layout.norm_shares + 3 * f / tp
    again = forward if layout.activation_checkpointing == "full" else 0.0
    return config.num_layers * t * e * (forward + backward + again)


def step_time(config: BertConfig, layout: Layout, device: Device) -> StepTime:
    """An estimate of one training step, forward, backward and optimizer."""
    tp, dp = layout.tensor_parallel_size, layout.data_parallel_size
    parameters = parameters_of_rank(config, tp)
    gathered = layout.tokens * config.hidden_size * layout.number_bytes
    # Two all-reduces forward and two backward; sequence parallelism makes each a gather and a
    # scatter of together as many bytes, and gathers two inputs once more for their weights.
    reduces = 4.0 + (2.0 if layout.activation_checkpointing == "full" else 0.0)
    gathers = 2.0 if layout.sequence_parallel else 0.0
    bandwidth, latency = _slowest_link(device, tp)
    share = (tp - 1) / tp
    collectives = (2 * reduces + gathers) * (share * gathered / bandwidth + (tp - 1) * latency)
    # Gradients meet across replicas, whose ranks are tp apart.
    bandwidth, latency = _slowest_link(device, layout.ranks if dp > 1 else 1)
    # Many ranks meet in a tree, which sends as many bytes as a ring in fewer steps.
    steps_s = 2 * math.ceil(math.log2(dp)) * latency
    data_parallel = 2 * (dp - 1) / dp * 4 * parameters / bandwidth + steps_s
    # AdamW reads weight, gradient and two moments and writes three of them back; bfloat16 weights
    # are written besides.
    optimizer_bytes = parameters * (30 if layout.precision == "bf16" else 28)
    return StepTime(
        products_s=step_flops(config, layout) / device.matrix_flops_per_s,
        kernels_s=step_kernel_bytes(config, layout) / device.copy_bytes_per_s,
        collectives_s=config.num_layers * collectives if tp > 1 else 0.0,
        data_parallel_s=data_parallel,
        optimizer_s=optimizer_bytes / device.copy_bytes_per_s,
    )


def efficiency(config: BertConfig, layout: Layout, device: Device) -> float:
    """Products that the step needs over all that the devices could do in its time, 0 to 1.

    Work that checkpointing repeats is not counted: model FLOP utilisation.
    """
    needed = Layout(**{**vars(layout), "activation_checkpointing": None})
    useful = step_flops(config, needed) / device.matrix_flops_per_s
    return useful / step_time(config, layout, device).total_s


def _slowest_link(device: Device, ranks: int) -> tuple[float, float]:
    """Bandwidth and latency of a ring over `ranks` consecutive ranks."""
    if ranks <= device.ranks_per_host:
        return device.link_bytes_per_s, device.link_latency_s
    return (
        min(device.link_bytes_per_s, device.network_bytes_per_s),
        max(device.link_latency_s, device.network_latency_s),
    )

"""The layers of tpcore with the arguments, results and parameter attributes of Megatron's.

Both spellings are taken: apex's and Megatron-LM's keywords (``params_dtype=``,
``sequence_parallel_enabled=``, ...), and Megatron-Core's ``config=``, any object with the
attributes of ModelParallelConfig. Where the two differ in a default, the presence of ``config``
decides.

Weights are drawn whole on the CPU and then split, with or without ``use_cpu_initialization``, which
only says where they live: the same seed gives the same model at every size and on every device.
"""

from __future__ import annotations

from typing import Any

import torch.nn.init as init
from torch import Tensor

from tpcore import layers
from tpcore.interop.megatron.parallel_state import resolve_group
from tpcore.interop.megatron.tensor_parallel.attributes import (
    copy_tensor_model_parallel_attributes,
    param_is_not_tensor_parallel_duplicate,
    set_defaults_if_not_set_tensor_model_parallel_attributes,
    set_tensor_model_parallel_attributes,
)
from tpcore.interop.megatron.tensor_parallel.mappings import Group
from tpcore.interop.megatron.tensor_parallel.options import InitMethod, LayerOptions, fill
from tpcore.layers.linear_function import column_parallel_linear
from tpcore.parallel.collectives import gather_from
from tpcore.parallel.group import divide
from tpcore.parallel.sharding import Sharded, ShardedParts, Sharding

__all__ = [
    "ColumnParallelLinear",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "copy_tensor_model_parallel_attributes",
    "linear_with_grad_accumulation_and_async_allreduce",
    "param_is_not_tensor_parallel_duplicate",
    "set_defaults_if_not_set_tensor_model_parallel_attributes",
    "set_tensor_model_parallel_attributes",
]


class ColumnParallelLinear(layers.ColumnParallelLinear):
    """Y = X A^T + b with the rows of A split over the ranks; returns (Y, bias or None).

    Args:
        input_size: size of each input row.
        output_size: size of each full output row; a multiple of the group's size and of ``stride``.
        bias: whether there is a bias.
        gather_output: return the full Y on every rank; None: True without ``config``, as apex and
            Megatron-LM, False with it, as Megatron-Core.
        init_method: fills the full weight; the bias is zero.
        stride: number of blocks of rows (of q, k and v, of a gate and its values) that are each
            split over the ranks.
        keep_master_weight_for_test: keep the full weight as ``master_weight``.
        skip_bias_add: leave the bias out and return it.
        config: says what ``keywords`` otherwise do.
        skip_weight_param_allocation: there is no weight; ``forward`` is given one.
        disable_grad_reduce: leave the gradient of X a part of a sum.
        tp_group: None: the group of this process.
        keywords: params_dtype, use_cpu_initialization, perform_initialization,
            sequence_parallel_enabled, gradient_accumulation_fusion; those about asynchronous
            communication mean nothing.

    Raises:
        ValueError: the size cannot be split so, or something is asked for that is not there.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool | None = None,
        init_method: InitMethod = init.xavier_normal_,
        stride: int = 1,
        keep_master_weight_for_test: bool = False,
        skip_bias_add: bool = False,
        *,
        config: Any = None,
        skip_weight_param_allocation: bool = False,
        disable_grad_reduce: bool = False,
        tp_group: Group = None,
        **keywords: Any,
    ) -> None:
        options = LayerOptions.of(config, keywords)
        gathers = config is None if gather_output is None else gather_output
        tp = resolve_group(tp_group)
        super().__init__(
            input_size,
            output_size,
            tp=tp,
            bias=bias,
            gather_output=gathers,
            skip_bias_add=skip_bias_add,
            sequence_parallel=options.sequence_parallel,
            accumulate_main_grad=options.gradient_accumulation_fusion,
            device="meta",
            dtype=options.params_dtype,
        )
        self.input_size, self.output_size = input_size, output_size
        self.output_size_per_partition = divide(output_size, tp.size, "output_size")
        self.stride = stride
        self.disable_grad_reduce = disable_grad_reduce
        if skip_weight_param_allocation:
            self.register_parameter("weight", None)
        fill(self, options, init_method, keep_master_weight_for_test)
        for parameter in self.parameters(recurse=False):
            set_tensor_model_parallel_attributes(parameter, True, 0, stride)

    @property
    def sequence_parallel_enabled(self) -> bool:
        """The same as ``sequence_parallel``."""
        return self.sequence_parallel

    def reset_parameters(self) -> None:
        """Draw the weight whole, then keep this rank's rows; the bias is zero."""
        if "weight" in self.own_sharding():
            super().reset_parameters()
        elif self.bias is not None:
            init.zeros_(self.bias)

    def own_sharding(self) -> dict[str, Sharding]:
        """Rows are split, in ``stride`` blocks."""
        stride = getattr(self, "stride", 1)  # the base class asks before it is set
        sharding = Sharded(0) if stride == 1 else ShardedParts(0, stride)
        return {name: sharding for name, _ in self.named_parameters(recurse=False)}

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """X [..., in] -> Y [..., out/tp] or, gathered, [..., out]; and the bias if it is skipped.

        Args:
            input_: X; sequence-parallel its share of dim 0.
            weight: in place of the layer's own, such as that of a tied embedding.
            runtime_gather_output: in place of ``gather_output``.

        Raises:
            ValueError: there is no weight, or X has another size.
        """
        weight = self.weight if weight is None else weight
        if weight is None:
            raise ValueError("this layer has no weight of its own; pass weight=")
        if input_.shape[-1] != self.input_size:
            raise ValueError(
                f"input_ has shape {list(input_.shape)}; expected input_size={self.input_size} in "
                "its last dimension"
            )
        output = column_parallel_linear(
            input_,
            weight,
            None if self.skip_bias_add else self.bias,
            self.tp,
            sequence_parallel=self.sequence_parallel,
            reduce_input_grad=not self.disable_grad_reduce,
            accumulate_main_grad=self.accumulate_main_grad,
        )
        gathers = self.gather_output if runtime_gather_output is None else runtime_gather_output
        if gathers:
            output = gather_from(output, self.tp)
        return output, self.bias if self.skip_bias_add else None


class RowParallelLinear(layers.RowParallelLinear):
    """Y = X A^T + b with the columns of A split over the ranks; returns (Y, bias or None).

    Args:
        input_size: size of each full input row; a multiple of the group's size.
        output_size: size of each output row.
        bias: whether there is a bias.
        input_is_parallel: X holds this rank's columns already.
        init_method: fills the full weight; the bias is zero.
        stride: number of blocks of columns that are each split over the ranks.
        keep_master_weight_for_test: keep the full weight as ``master_weight``.
        skip_bias_add: leave the bias out and return it.
        config: says what ``keywords`` otherwise do.
        tp_group: None: the group of this process.
        keywords: as those of ColumnParallelLinear.

    With sequence parallelism the gradient of the bias is whole after the backward, and
    ``bias.sequence_parallel`` is False: a loop that sums marked gradients finds none to sum.

    Raises:
        ValueError: the size cannot be split so, or something is asked for that is not there.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = False,
        init_method: InitMethod = init.xavier_normal_,
        stride: int = 1,
        keep_master_weight_for_test: bool = False,
        skip_bias_add: bool = False,
        *,
        config: Any = None,
        tp_group: Group = None,
        **keywords: Any,
    ) -> None:
        options = LayerOptions.of(config, keywords)
        tp = resolve_group(tp_group)
        if options.sequence_parallel and not input_is_parallel:
            raise ValueError("sequence parallelism needs input_is_parallel=True")
        super().__init__(
            input_size,
            output_size,
            tp=tp,
            bias=bias,
            input_is_parallel=input_is_parallel,
            skip_bias_add=skip_bias_add,
            sequence_parallel=options.sequence_parallel,
            accumulate_main_grad=options.gradient_accumulation_fusion,
            device="meta",
            dtype=options.params_dtype,
        )
        self.input_size, self.output_size = input_size, output_size
        self.input_size_per_partition = divide(input_size, tp.size, "input_size")
        self.stride = stride
        fill(self, options, init_method, keep_master_weight_for_test)
        set_tensor_model_parallel_attributes(self.weight, True, 1, stride)
        if self.bias is not None:
            self.bias.sequence_parallel = False  # type: ignore[attr-defined]

    @property
    def sequence_parallel_enabled(self) -> bool:
        """The same as ``sequence_parallel``."""
        return self.sequence_parallel

    def own_sharding(self) -> dict[str, Sharding]:
        """Columns of the weight are split, in ``stride`` blocks; the bias is whole."""
        stride = getattr(self, "stride", 1)  # the base class asks before it is set
        return {"weight": Sharded(1) if stride == 1 else ShardedParts(1, stride)}

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """X [..., in/tp] (or [..., in]) -> Y [..., out], and the bias if it is skipped."""
        result = super().forward(input_)
        return result if self.skip_bias_add else (result, None)


class VocabParallelEmbedding(layers.VocabParallelEmbedding):
    """The rows of a table for ids, with the rows split over the ranks.

    Args:
        num_embeddings: rows of the table, padding included; a multiple of the group's size.
        embedding_dim: h.
        init_method: fills the full table.
        reduce_scatter_embeddings: ids [b, s] -> [s/tp, b, h], this rank's share of the positions,
            for sequence parallelism; otherwise ids [...] -> [..., h].
        config: says what ``keywords`` otherwise do.
        tp_group: None: the group of this process.
        keywords: params_dtype, use_cpu_initialization, perform_initialization.

    Raises:
        ValueError: the table cannot be split so.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        init_method: InitMethod = init.xavier_normal_,
        *,
        reduce_scatter_embeddings: bool = False,
        config: Any = None,
        tp_group: Group = None,
        **keywords: Any,
    ) -> None:
        options = LayerOptions.of(config, keywords)
        tp = resolve_group(tp_group)
        super().__init__(
            num_embeddings,
            embedding_dim,
            tp=tp,
            sequence_parallel=reduce_scatter_embeddings,
            device="meta",
            dtype=options.params_dtype,
        )
        self.reduce_scatter_embeddings = reduce_scatter_embeddings
        self.num_embeddings_per_partition = self.weight.shape[0]
        self.vocab_start_index = self.vocab_start
        self.vocab_end_index = self.vocab_start + self.num_embeddings_per_partition
        fill(self, options, init_method, False)
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def own_unpadded_sizes(self) -> dict[str, int]:
        """Which rows are padding is known to whoever chose ``num_embeddings``."""
        return {}

    def forward(self, input_: Tensor) -> Tensor:
        """Ids -> rows of the table.

        Raises:
            ValueError: an id has no row (checked on the CPU).
        """
        if not self.reduce_scatter_embeddings:
            return super().forward(input_)
        return super().forward(input_.transpose(0, 1))


def linear_with_grad_accumulation_and_async_allreduce(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gradient_accumulation_fusion: bool = False,
    allreduce_dgrad: bool | None = None,
    sequence_parallel: bool | None = None,
    grad_output_buffer: None = None,
    wgrad_deferral_limit: None = None,
    tp_group: Group = None,
    *,
    async_grad_allreduce: bool | None = None,
    sequence_parallel_enabled: bool | None = None,
) -> Tensor:
    """X A_r^T + b_r, with the gradient of X summed over the ranks while that of A_r is computed.

    Args:
        input: X [..., in]; sequence-parallel this rank's share of dim 0.
        weight: A_r [out/tp, in].
        bias: b_r [out/tp] or None.
        gradient_accumulation_fusion: add the weight gradient to ``weight.main_grad``, in float32,
            and leave ``weight.grad`` None.
        allreduce_dgrad: whether to sum the gradient of X; apex's name: ``async_grad_allreduce``.
        sequence_parallel: gather X along dim 0, and reduce and scatter its gradient; apex's name:
            ``sequence_parallel_enabled``.
        grad_output_buffer: None.
        wgrad_deferral_limit: None.
        tp_group: None: the group of this process.
        async_grad_allreduce: see ``allreduce_dgrad``.
        sequence_parallel_enabled: see ``sequence_parallel``.

    Raises:
        ValueError: both sums are asked for, or weight gradients are to be deferred.
    """
    if grad_output_buffer is not None or wgrad_deferral_limit:
        raise ValueError("grad_output_buffer: deferred weight gradients are not supported")
    reduces = bool(async_grad_allreduce if allreduce_dgrad is None else allreduce_dgrad)
    is_sequence = bool(
        sequence_parallel_enabled if sequence_parallel is None else sequence_parallel
    )
    if reduces and is_sequence:
        raise ValueError(
            "allreduce_dgrad and sequence_parallel exclude each other: the reduce-scatter is a sum"
        )
    return column_parallel_linear(
        input,
        weight,
        bias,
        resolve_group(tp_group),
        sequence_parallel=is_sequence,
        reduce_input_grad=reduces,
        accumulate_main_grad=gradient_accumulation_fusion,
    )

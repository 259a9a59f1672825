"""The verbs: load, save, inspect, convert."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tpcore.checkpoint import folders, registry, writers
from tpcore.checkpoint.build import AUTO, build_model, override_config, state_from_model
from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.formats import huggingface, megatron, megatron_dist, megatron_files, nemo
from tpcore.checkpoint.info import CheckpointInfo
from tpcore.checkpoint.per_host import PerHost
from tpcore.checkpoint.progress import watched
from tpcore.checkpoint.state import CanonicalState, Source
from tpcore.checkpoint.stated import Stated, apply_stated, stated_config
from tpcore.checkpoint.untrusted import dist_metadata
from tpcore.checkpoint.untrusted.unpickle import check_embedded, check_records
from tpcore.checkpoint.writers import Format
from tpcore.layers.block import ActivationCheckpointing
from tpcore.models.bert import BertModel
from tpcore.parallel.group import TensorParallelGroup


def load(
    path: str | Path,
    *,
    tp: TensorParallelGroup | None = None,
    head: str | None = AUTO,
    qkv_layout: str | None = None,
    config_file: str | Path | None = None,
    config: Mapping[str, Any] | str | None = None,
    num_labels: int | None = None,
    head_kwargs: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    sequence_parallel: bool = False,
    activation_checkpointing: ActivationCheckpointing = None,
    accumulate_main_grad: bool = False,
    **config_overrides: Any,
) -> BertModel:
    """Load a checkpoint of any format and any tensor-parallel size into a model of `tp`'s size.

    Every rank calls it and reads only the files; no communication takes place.

    Args:
        path: a Megatron-LM directory (its root, an iteration, or one file) or a Hugging Face
            folder. Which one it is shows in its content. If nothing is there, the name of a
            released encoder (`tpcore.checkpoint.registry`), downloaded once.
        tp: the tensor-parallel group; None: a single process.
        head: "auto" builds the head that the file holds, if any; None leaves it out; a name
            (`tpcore.models.heads.HEADS`) builds that one, newly initialised if the file has
            another or none, which one log line says.
        qkv_layout: order of the q/k/v rows ("v0", "v1", "v3"), for a file that does not tell.
        config_file: JSON that says what a file without arguments cannot, in Megatron's names or
            BertConfig's, with hyphens or underscores; must agree with what the file says.
        config: the same as a mapping, or the name of a preset; `config_file` wins.
        num_labels: of a new classification head; must agree with that of the file's own.
        head_kwargs: further arguments of the head (dropout, regression, binary).
        device: where the parameters live; None: the CPU.
        dtype: of the parameters; None: torch's default dtype, whatever the file's is.
        sequence_parallel: see `BertModel`; so are the next two.
        activation_checkpointing: None, "full" or "selective".
        accumulate_main_grad: weight gradients go to `weight.main_grad`.
        config_overrides: fields of `BertConfig` that replace what the file says (`gelu`,
            `hidden_dropout`, `attention_dropout`, `vocab_size` for a file that only knows its
            padded size, `num_attention_heads` for one that does not say it, ...).

    Raises:
        CheckpointError: something in the file is damaged, missing, left over or contradicts what
            was asked for.
    """
    tp = TensorParallelGroup.single() if tp is None else tp
    state = _read(Path(path), qkv_layout, config_overrides, stated_config(config_file, config))
    checked = _checked(state, tp.rank)
    model = build_model(
        state,
        tp=tp,
        head=head,
        num_labels=num_labels,
        head_kwargs=head_kwargs,
        device=device,
        dtype=dtype,
        model_options={
            "sequence_parallel": sequence_parallel,
            "activation_checkpointing": activation_checkpointing,
            "accumulate_main_grad": accumulate_main_grad,
        },
    )
    del checked
    return model


def save(
    model: BertModel,
    path: str | Path,
    *,
    format: Format = "megatron",
    tensor_parallel_size: int | None = None,
    iteration: int | None = None,
    labels: Sequence[str] | None = None,
    tokenizer_files: Iterable[str | Path] = (),
    nemo_config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model as a folder or a `.nemo` file; every rank of its group calls it.

    With formats that have a file for each rank, and the model's own size, each rank writes its
    own; otherwise tensors are gathered one after the other and rank 0 writes. The checkpoint
    appears when all of it is written, or not at all.

    Args:
        model: the model; its group says which ranks take part.
        path: the folder to make; the file, if format is "nemo".
        format: "megatron" (version 3), "megatron-core", "nemo" or "huggingface".
        tensor_parallel_size: of the checkpoint; None: that of the model. A Hugging Face folder has
            none.
        iteration: writes iter_XXXXXXX instead of release (Megatron only).
        labels: names of a classifier's labels, kept in the checkpoint.
        tokenizer_files: files such as vocab.txt, copied beside the weights.
        nemo_config: content of a .nemo file's model_config.yaml; what describes the encoder, the
            vocabulary and the labels is filled in.
        overwrite: replace a checkpoint that is there.

    Raises:
        CheckpointError: the model does not fit the format or the size, or the folder cannot be
            written; raised on every rank.
    """
    writers.check_format(format)
    if not isinstance(model, BertModel):
        raise CheckpointError(f"a {type(model).__name__} cannot be saved; expected a BertModel")
    tp = model.tp
    destination = Path(path).resolve()
    source = Source(path=Path("model"), format="tpcore", iteration=iteration)
    state = state_from_model(model, labels=tuple(labels) if labels else None, source=source)
    size = tp.size if tensor_parallel_size is None else tensor_parallel_size
    writers.check_writable(state, format, size)
    device = next(model.parameters()).device
    files = [Path(file) for file in tokenizer_files]

    folders.write_together(
        destination,
        tp,
        device,
        prepare=lambda: writers.prepare(destination, format, overwrite),
        write=lambda folder: writers.write(state, folder, format, size, tp, files),
        finish=lambda folder: writers.finish(state, folder, format, size, files, nemo_config),
        publish=lambda: writers.publish(destination, format),
    )


def inspect(
    path: str | Path,
    *,
    qkv_layout: str | None = None,
    config_file: str | Path | None = None,
    config: Mapping[str, Any] | str | None = None,
    **config_overrides: Any,
) -> CheckpointInfo:
    """What a checkpoint holds: format, sizes, configuration, every parameter.

    Reads no tensor where the file can be mapped (all but torch files from before version 1.6).

    Raises:
        CheckpointError: as `load`.
    """
    return CheckpointInfo.from_state(
        _read(Path(path), qkv_layout, config_overrides, stated_config(config_file, config))
    )


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Format,
    tensor_parallel_size: int = 1,
    qkv_layout: str | None = None,
    config_file: str | Path | None = None,
    config: Mapping[str, Any] | str | None = None,
    overwrite: bool = False,
    **config_overrides: Any,
) -> CheckpointInfo:
    """Rewrite a checkpoint in another format or at another tensor-parallel size.

    Tensors keep their dtype and their bits; the files of a tokenizer found beside the source go
    along. Runs in one process, and needs memory for one full tensor. Weights that are not finite
    numbers get one line in the log.

    Args:
        source: any checkpoint that `load` reads.
        destination: the folder to make; the file, if `to` is "nemo".
        to: "megatron", "megatron-core", "nemo" or "huggingface".
        tensor_parallel_size: of the checkpoint that is written.
        qkv_layout: as in `load`.
        config_file: as in `load`.
        config: as in `load`.
        overwrite: replace a checkpoint that is there.
        config_overrides: as in `load`; they are written into the new checkpoint.

    Returns:
        What was written, as `inspect` finds it.

    Raises:
        CheckpointError: as `load` and `save`; the destination is then as it was before.
    """
    writers.check_format(to)
    source, destination = Path(source), Path(destination).resolve()
    state = _read(source, qkv_layout, config_overrides, stated_config(config_file, config))
    writers.check_writable(state, to, tensor_parallel_size)
    _checked(state)
    folders.check_apart(destination, state.source.path, state.source.files)
    writers.prepare(destination, to, overwrite)
    folder, size = folders.pending(destination), tensor_parallel_size
    about = state.source
    try:
        with watched(state, size if to != "huggingface" else 1, destination.name) as seen:
            single = TensorParallelGroup.single()
            writers.write(seen, folder, to, size, single, about.tokenizer_files)
        writers.finish(state, folder, to, size, about.tokenizer_files, about.settings)
        writers.publish(destination, to)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise folders.unwritable(destination, error) from error
    finally:
        folders.discard(destination)
    return inspect(destination)


def _read(
    path: Path,
    qkv_layout: str | None,
    overrides: Mapping[str, Any],
    stated: Stated | None = None,
) -> CanonicalState:
    given = overrides
    if stated is not None:
        # The readers need of it what no shape says.
        needed = ("num_attention_heads", "num_token_types")
        overrides = {n: stated.fields[n] for n in needed if n in stated.fields} | dict(overrides)
    if not path.exists():
        folders.check_not_replaced(path)
        given = {**registry.known_facts(path), **given}
        path = registry.locate(path)
    if huggingface.recognise(path):
        if qkv_layout is not None:
            raise CheckpointError(
                f"{path}: qkv_layout={qkv_layout!r} has no meaning for a Hugging Face folder, "
                "which keeps q, k and v apart"
            )
        state = huggingface.read(path)
    elif nemo.recognise(path):
        state = nemo.read(path, qkv_layout=qkv_layout, overrides=overrides)
    elif megatron_dist.recognise(path):
        if qkv_layout not in (None, "v3"):
            raise CheckpointError(
                f"{path}: qkv_layout={qkv_layout!r}, but a torch_dist checkpoint has the order v3"
            )
        state = megatron_dist.read(path, overrides=overrides)
    elif megatron_files.recognise(path):
        state = megatron.read(path, qkv_layout=qkv_layout, overrides=overrides)
    else:
        if huggingface.lacks_config(path):
            raise CheckpointError(
                f"{path}: there are weights, but no {huggingface.CONFIG} beside them; copy that of "
                "the model there"
            )
        raise CheckpointError(
            f"{path}: no checkpoint is recognised there; expected a Megatron-LM directory "
            f"({megatron_files.TRACKER}, mp_rank_XX folders or {dist_metadata.METADATA}), one of "
            "its .pt files, a .nemo or .ckpt file, or a Hugging Face folder "
            f"({huggingface.CONFIG} with {huggingface.SAFETENSORS} or "
            f"{huggingface.PICKLE})"
        )
    if stated is not None:
        state = apply_stated(state, stated)
    return override_config(state, given)


def _checked(state: CanonicalState, first: int = 0) -> list[PerHost]:
    """Compare the checksums of all files, once for all processes of a machine.

    What is returned says to the others that a file was checked, as long as it lives. `first`: with
    which of the files to begin, so that ranks do not all wait for the same one.
    """
    checks: dict[Path, list[Callable[[], None]]] = {}
    for file in state.source.files:
        if file.suffix not in (".distcp", ".safetensors", ".json"):  # those have no checksums
            checks.setdefault(file, []).append(partial(check_records, file))
    for file, offset, size, where in state.source.parts:
        checks.setdefault(file, []).append(partial(check_embedded, file, offset, size, where))
    held: list[PerHost] = []
    files = list(checks)
    for file in files[first % len(files) :] + files[: first % len(files)] if files else ():

        def check(_: Path | None, own: Sequence[Callable[[], None]] = checks[file]) -> None:
            for compare in own:
                compare()

        try:
            held.append(PerHost(file, "checked", check))
        except OSError:
            check(None)  # no place for a note; the file itself may be the cause, which this says
    return held

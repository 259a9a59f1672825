"""Hugging Face folders of BERT and MegatronBert: config.json with safetensors or a torch pickle.

The two models are one encoder: `BertModel` is post-layernorm with its norms counted from the
residual they follow (see `names.BERT`), `MegatronBertModel` is pre-layernorm. Heads for
pre-training, masked LM, sequence and token classification and question answering are read and
written.
"""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tpcore.checkpoint import names
from tpcore.checkpoint.errors import CheckpointError, shown
from tpcore.checkpoint.formats import qkv
from tpcore.checkpoint.formats.huggingface_config import (
    CLASSES,
    TABLES,
    architecture_from_fields,
    config_from_fields,
    config_values,
    head_from_fields,
    labels_from_fields,
    model_type_from_fields,
    model_type_of,
    read_json,
)
from tpcore.checkpoint.safetensors_file import SafetensorsWriter
from tpcore.checkpoint.state import (
    HEADS,
    CanonicalState,
    Source,
    check_complete,
    check_head,
    find_head,
    has_pooler,
    sizes_from_shapes,
    tokenizer_files,
)
from tpcore.checkpoint.stored import Box, FilePiece, StoredTensor, file_pieces, joined, num_bytes
from tpcore.checkpoint.untrusted.fields import Fields
from tpcore.checkpoint.untrusted.unpickle import load_pickle
from tpcore.models.config import BertConfig

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def recognise(path: Path) -> bool:
    """Whether `path` is such a folder, or the weights in one."""
    folder = _folder(path)
    return (folder / CONFIG).is_file() and _weights_file(folder) is not None


def lacks_config(path: Path) -> bool:
    """Whether there are such weights without the file that says what they are."""
    folder = _folder(path)
    return _weights_file(folder) is not None and not (folder / CONFIG).is_file()


def read(path: Path) -> CanonicalState:
    """Read a folder.

    Raises:
        CheckpointError: a file is missing or damaged, the model is not a BERT encoder, or a
            parameter is not accounted for.
    """
    folder = _folder(path)
    where = str(folder)
    fields = Fields(read_json(folder / CONFIG), str(folder / CONFIG), prefix="")
    stored = _stored_tensors(folder)
    spelled = names.apply_aliases(stored, names.HUGGINGFACE_ALIASES, where)
    model_type = model_type_from_fields(fields, spelled, where)
    num_layers = names.count_layers(spelled, where)
    keys = names.translate(spelled, names.expand(TABLES[model_type], num_layers), where)

    copies = {
        target: stored[spelled[key]]
        for key, target in names.HUGGINGFACE_TIED.items()
        if key in spelled
    }
    tensors = {name: stored[key] for name, key in keys.items()}
    if "head.lm.bias" in copies and "head.lm.bias" not in tensors:
        # Newer files name the tied bias after the decoder.
        del copies["head.lm.bias"]
        tensors["head.lm.bias"] = stored[spelled["cls.predictions.decoder.bias"]]
    if "head.lm.dense.weight" not in tensors:
        copies = {}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    sizes = sizes_from_shapes(shapes, num_layers, where)
    config = config_from_fields(fields, model_type, sizes, has_pooler(tensors))
    _join_qkv(tensors, config, where)
    head, head_kwargs = head_from_fields(fields, find_head(tensors), tensors)
    tokenizer_config = folder / "tokenizer_config.json"
    lowercase = None
    if tokenizer_config.is_file():
        flags = read_json(tokenizer_config)
        lowercase = flags.get("do_lower_case") if "do_lower_case" in flags else None
    return check_complete(
        CanonicalState(
            config=config,
            head=head,
            head_kwargs=head_kwargs,
            labels=labels_from_fields(fields, head_kwargs.get("num_labels")),
            tensors=tensors,
            copies=copies,
            source=Source(
                path=folder,
                format=f"Hugging Face {CLASSES[model_type]}",
                version=fields.text("transformers_version") or "",
                qkv_layout="separate q, k, v",
                lowercase=lowercase if isinstance(lowercase, bool) else None,
                notes=(f"architecture: {architecture_from_fields(fields) or 'not said'}",),
                stated=frozenset(BertConfig.__dataclass_fields__),
                files=(folder / CONFIG, *_weights_files(folder)),
                tokenizer_files=tokenizer_files([folder]),
            ),
        )
    )


def check_writable(state: CanonicalState) -> dict[str, str]:
    """Canonical name (q, k and v apart) -> name in the file; an error before anything is written.

    Raises:
        CheckpointError: transformers has no such head or no such encoder.
    """
    where = state.source.path
    config = state.config
    check_head(state, HEADS)
    if config.num_token_types == 0:
        raise CheckpointError(
            f"{where}: the model has no token types; transformers has no BERT without them"
        )
    if state.head == "sequence_classification" and not state.head_kwargs.get("pooler", True):
        raise CheckpointError(
            f"{where}: its classifier sees the first token without a pooler; transformers has no "
            "such model (head=None, or another format, keeps what there is)"
        )
    expanded = names.expand(TABLES[model_type_of(config)], config.num_layers)
    inverse = {target: key for key, target in expanded.items() if target is not None}
    known = {name.replace(".qkv.query.", ".qkv.") for name in inverse}
    unknown = [name for name in state.tensors if name not in known]
    if unknown:
        raise CheckpointError(
            f"{where}: a Hugging Face folder has no place for {names.listing(unknown)}"
        )
    return inverse


def save(state: CanonicalState, folder: Path, *, write: bool = True) -> None:
    """Write config.json and model.safetensors, one tensor after the other.

    With the state of a model that several ranks hold, all of them call it: reading is collective,
    so every tensor is read before an error is raised.

    Args:
        state: the model.
        folder: where to put the files.
        write: whether this rank writes; the others only take part in reading.

    Raises:
        CheckpointError: as `check_writable`.
        OSError: a file cannot be written.
    """
    inverse = check_writable(state)
    prefix = "" if state.head is None else "bert."

    def key_of(name: str) -> str:
        key = inverse[name]
        return key if name.startswith("head.") else prefix + key

    rows = state.config.vocab_size
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    keys: dict[str, list[str]] = {}
    for name, stored in state.tensors.items():
        shape = (rows, *stored.shape[1:]) if name in names.VOCABULARY_PARAMETERS else stored.shape
        match = re.fullmatch(r"(.*\.qkv)\.(weight|bias)", name)
        keys[name] = (
            [key_of(name)]
            if match is None
            else [key_of(f"{match.group(1)}.{part}.{match.group(2)}") for part in names.QKV_PARTS]
        )
        if match is not None:
            shape = (shape[0] // 3, *shape[1:])
        layout.update(dict.fromkeys(keys[name], (shape, stored.dtype)))
    values = config_values(state, next(iter(layout.values()))[1])
    errors: list[Exception] = []
    with SafetensorsWriter(folder / SAFETENSORS, layout) as file:
        for name in state.tensors:
            full = state.full(name, rows)
            if not write or errors:
                continue
            parts = [full]
            if len(keys[name]) > 1:
                parts = list(qkv.split(full, state.config.num_attention_heads))
            try:
                for key, part in zip(keys[name], parts, strict=True):
                    file.add(key, part)
            except OSError as error:
                errors.append(error)
        if errors:
            raise errors[0]
    if write:
        (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


# --- weights -------------------------------------------------------------------------------------


def _folder(path: Path) -> Path:
    return path.parent if path.name in (SAFETENSORS, PICKLE, CONFIG) else path


def _weights_file(folder: Path) -> Path | None:
    for name in (SAFETENSORS, SAFETENSORS + INDEX_SUFFIX, PICKLE, PICKLE + INDEX_SUFFIX):
        if (folder / name).is_file():
            return folder / name
    return None


def _weights_files(folder: Path) -> list[Path]:
    """The weights, or the index and all its parts."""
    file = _weights_file(folder)
    assert file is not None
    if not file.name.endswith(INDEX_SUFFIX):
        return [file]
    return [file, *(folder / name for name in sorted(set(_weight_map(file).values())))]


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder by its name in the file, none of them read."""
    file = _weights_file(folder)
    if file is None:
        raise CheckpointError(f"{folder}: holds neither {SAFETENSORS} nor {PICKLE}")
    if not file.name.endswith(INDEX_SUFFIX):
        return _read_weights(file)
    shards = _weight_map(file)
    stored: dict[str, StoredTensor] = {}
    for name in sorted(set(shards.values())):
        for key, tensor in _read_weights(folder / name).items():
            if shards.get(key) != name:
                raise CheckpointError(
                    f"{folder / name}: holds {key}, which the index puts elsewhere"
                )
            stored[key] = tensor
    missing = shards.keys() - stored.keys()
    if missing:
        raise CheckpointError(f"{file}: lists {names.listing(sorted(missing))}, found in no file")
    return stored


def _weight_map(index: Path) -> dict[str, str]:
    """Parameter -> name of the file that holds it."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in shards.values()
    ):
        raise CheckpointError(f"{index}: has no weight_map from parameters to file names")
    return shards


def _read_weights(file: Path) -> dict[str, StoredTensor]:
    if file.suffix != ".safetensors":
        return _read_pickle(file)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        # The library checks that the header is whole, and that tensors lie side by side.
        handle = safe_open(file, framework="pt", device="cpu")
        keys = set(handle.keys())
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise CheckpointError(
            f"{file}: not a readable safetensors file, truncated or damaged ({error})"
        ) from error
    stored: dict[str, StoredTensor] = {}
    for key in sorted(keys):
        # Read, not mapped: mapped pages would count as memory of the process.
        about = header[key]
        shape, dtype = tuple(about["shape"]), _DTYPES.get(about["dtype"], torch.uint8)
        strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        begin = 8 + length + about["data_offsets"][0]
        stored[key] = joined([FilePiece(file, str(file), begin, shape, strides, dtype)], None)
    return stored


def _read_pickle(file: Path) -> dict[str, StoredTensor]:
    loaded = load_pickle(file)
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file}: holds a {type(loaded).__name__}, not a dict of tensors")
    limit = file.stat().st_size
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{file}: {shown(key)} is a {type(value).__name__}, not a tensor")
        if num_bytes(value) > limit:
            raise CheckpointError(
                f"{file}: {key} claims shape {list(value.shape)}, more than is there"
            )
    pieces = file_pieces(loaded, file, str(file))
    return {key: joined([piece], None) for key, piece in pieces.items()}


def _join_qkv(tensors: dict[str, StoredTensor], config: BertConfig, where: str) -> None:
    """Replace the separate q, k and v of every layer by one canonical qkv."""
    hidden = config.hidden_size
    for layer in range(config.num_layers):
        for kind, shape in (("weight", (hidden, hidden)), ("bias", (hidden,))):
            base = f"blocks.{layer}.attention.qkv"
            part_names = [f"{base}.{part}.{kind}" for part in names.QKV_PARTS]
            missing = [name for name in part_names if name not in tensors]
            if missing:
                raise CheckpointError(f"{where}: missing parameters: {names.listing(missing)}")
            parts = [tensors.pop(name) for name in part_names]
            for name, part in zip(part_names, parts, strict=True):
                if part.shape != shape or part.dtype != parts[0].dtype:
                    raise CheckpointError(
                        f"{where}: {name} has shape {list(part.shape)}, dtype {part.dtype}; "
                        f"expected {list(shape)}, {parts[0].dtype}"
                    )
            tensors[f"{base}.{kind}"] = StoredTensor(
                (3 * hidden, *shape[1:]),
                parts[0].dtype,
                partial(_read_qkv, parts, config, None),
                partial(_read_qkv, parts, config),
            )


def _read_qkv(parts: list[StoredTensor], config: BertConfig, box: Box | None) -> Tensor:
    """Canonical rows, (n, 3, d); of a box, the heads that it touches are read."""
    first, last = (0, config.num_attention_heads)
    step = config.head_size
    if box is not None:
        first, last = box[0][0] // (3 * step), -(-box[0][1] // (3 * step))
    rows = [part.narrow(0, first * step, last * step) for part in parts]
    full = qkv.join(rows[0], rows[1], rows[2], last - first)
    if box is None:
        return full
    begin = box[0][0] - first * 3 * step
    inner = (slice(begin, begin + box[0][1] - box[0][0]), *(slice(*b) for b in box[1:]))
    return full[inner].contiguous()

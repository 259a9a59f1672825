"""Tiny checkpoints, written from the description of the formats, not with tpcore's own tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from tpcore.checkpoint.formats import megatron
from tpcore.checkpoint.state import CanonicalState

HIDDEN, HEADS, FEED_FORWARD, POSITIONS, ROWS, LAYERS = 16, 4, 32, 8, 256, 4

# Canonical name, Megatron's path below the layer (new names), sharded dimension (None: replicated).
LAYER = (
    ("input_norm", "input_layernorm", {"weight": None, "bias": None}),
    ("attention.qkv", "self_attention.query_key_value", {"weight": 0, "bias": 0}),
    ("attention.dense", "self_attention.dense", {"weight": 1, "bias": None}),
    ("post_attention_norm", "post_attention_layernorm", {"weight": None, "bias": None}),
    ("mlp.dense_in", "mlp.dense_h_to_4h", {"weight": 0, "bias": 0}),
    ("mlp.dense_out", "mlp.dense_4h_to_h", {"weight": 1, "bias": None}),
)
FIRST_STAGE = (
    ("embeddings.word_embeddings.weight", "embedding.word_embeddings.weight", 0),
    ("embeddings.position_embeddings.weight", "embedding.position_embeddings.weight", None),
    ("embeddings.token_type_embeddings.weight", "embedding.tokentype_embeddings.weight", None),
)
LAST_STAGE = (
    ("final_norm.weight", "encoder.final_layernorm.weight", None),
    ("final_norm.bias", "encoder.final_layernorm.bias", None),
    ("pooler.dense.weight", "pooler.dense.weight", None),
    ("pooler.dense.bias", "pooler.dense.bias", None),
)
PRETRAINING_HEAD = (
    ("head.lm.dense.weight", "lm_head.dense.weight", None),
    ("head.lm.dense.bias", "lm_head.dense.bias", None),
    ("head.lm.norm.weight", "lm_head.layernorm.weight", None),
    ("head.lm.norm.bias", "lm_head.layernorm.bias", None),
    ("head.lm.bias", "lm_head.bias", 0),
    ("head.binary.weight", "binary_head.weight", None),
    ("head.binary.bias", "binary_head.bias", None),
)
SPELLINGS = {
    "new": (),
    "old": (("encoder.", "transformer."), ("self_attention.", "attention.")),
    "norm": (("_layernorm.", "_norm."),),
}


def random_model(layers: int = LAYERS, rows: int = ROWS, seed: int = 0) -> dict[str, torch.Tensor]:
    """Canonical name -> full tensor, with the pre-training head."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    h, f = HIDDEN, FEED_FORWARD
    model = {
        "embeddings.word_embeddings.weight": draw(rows, h),
        "embeddings.position_embeddings.weight": draw(POSITIONS, h),
        "embeddings.token_type_embeddings.weight": draw(2, h),
    }
    sizes = {
        "input_norm": (h,),
        "attention.qkv": (3 * h, h),
        "attention.dense": (h, h),
        "post_attention_norm": (h,),
        "mlp.dense_in": (f, h),
        "mlp.dense_out": (h, f),
    }
    for layer in range(layers):
        for name, shape in sizes.items():
            model[f"blocks.{layer}.{name}.weight"] = draw(*shape)
            model[f"blocks.{layer}.{name}.bias"] = draw(shape[0])
    for name, shape in (
        ("final_norm", (h,)),
        ("pooler.dense", (h, h)),
        ("head.lm.dense", (h, h)),
        ("head.lm.norm", (h,)),
        ("head.binary", (2, h)),
    ):
        model[f"{name}.weight"] = draw(*shape)
        model[f"{name}.bias"] = draw(shape[0])
    model["head.lm.bias"] = draw(rows)
    return model


def qkv_rows(version: int, heads: int) -> list[int]:
    """Row i of a file of this version is row qkv_rows[i] of the order (n, 3, d)."""
    d = HIDDEN // HEADS
    canonical = {
        (head, part, column): (head * 3 + part) * d + column
        for head in range(heads)
        for part in range(3)
        for column in range(d)
    }
    if version == 0:
        key = lambda place: (place[1], place[0], place[2])  # noqa: E731
    elif version == 1:
        key = lambda place: (place[0], place[2], place[1])  # noqa: E731
    else:
        key = lambda place: place  # noqa: E731
    return [canonical[place] for place in sorted(canonical, key=key)]


def args_of(version: int, tp: int, pp: int = 1, **changes: object) -> argparse.Namespace:
    """What a run of that time kept in its arguments."""
    values = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "padded_vocab_size": ROWS,
        "layernorm_epsilon": 1e-5,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "openai_gelu": False,
        "apply_residual_connection_post_layernorm": False,
        "tokenizer_type": "BertWordPieceLowerCase",
    }
    if version >= 3:
        values |= {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "ffn_hidden_size": FEED_FORWARD,
            "bias_gelu_fusion": False,
            "onnx_safe": None,
            "params_dtype": torch.float32,
        }
    else:
        values["model_parallel_size"] = tp
    return argparse.Namespace(**{**values, **changes})


def rank_model(
    model: dict[str, torch.Tensor],
    *,
    version: int,
    spelling: str,
    rank: int,
    tp: int,
    layers: range,
    first: bool,
    last: bool,
) -> dict[str, torch.Tensor]:
    """One rank's parameters of one stage, flat, under Megatron's names."""

    def piece(name: str, dim: int | None) -> torch.Tensor:
        full = model[name]
        if dim is None:
            return full.clone()
        part = full.chunk(tp, dim)[rank].clone()
        return part[qkv_rows(version, HEADS // tp)] if ".qkv." in name else part

    entries = []
    if first:
        entries += [(name, f"language_model.{key}", dim) for name, key, dim in FIRST_STAGE]
    for number, layer in enumerate(layers):
        for name, key, dims in LAYER:
            entries += [
                (
                    f"blocks.{layer}.{name}.{kind}",
                    f"language_model.encoder.layers.{number}.{key}.{kind}",
                    dim,
                )
                for kind, dim in dims.items()
            ]
    if last:
        entries += [(name, f"language_model.{key}", dim) for name, key, dim in LAST_STAGE]
        entries += PRETRAINING_HEAD
    flat = {}
    for name, key, dim in entries:
        for new, other in SPELLINGS[spelling]:
            key = key.replace(new, other)
        flat[key] = piece(name, dim)
    if last and not first:
        flat["word_embeddings_for_head.weight"] = piece("embeddings.word_embeddings.weight", 0)
    return flat


def nest(flat: dict[str, torch.Tensor]) -> dict:
    """Megatron's nesting: language_model -> part -> dotted names; heads one deep."""
    tree: dict = {}
    for key, tensor in flat.items():
        parts = key.split(".")
        if parts[0] != "language_model":
            tree.setdefault(parts[0], {})[".".join(parts[1:])] = tensor
        elif parts[1] == "embedding":
            part = tree.setdefault("language_model", {}).setdefault("embedding", {})
            part.setdefault(parts[2], {})[parts[3]] = tensor
        else:
            part = tree.setdefault("language_model", {}).setdefault(parts[1], {})
            part[".".join(parts[2:])] = tensor
    return tree


def write_megatron(
    root: Path,
    model: dict[str, torch.Tensor],
    *,
    version: int = 3,
    spelling: str = "new",
    nested: bool = True,
    tp: int = 1,
    pp: int = 1,
    chunks: int = 1,
    iteration: int | None = 10,
    args: object = "default",
    zipped: bool = True,
    edit=None,
) -> Path:
    """Write a directory; `edit(content, rank, stage)` may change each file's dict first."""
    name = "release" if iteration is None else f"iter_{iteration:07d}"
    layers = 1 + max(int(key.split(".")[1]) for key in model if key.startswith("blocks."))
    per_chunk = layers // (pp * chunks)
    for stage in range(pp):
        for rank in range(tp):
            content: dict = {"iteration": iteration or 0}
            if args == "default":
                content["args"] = args_of(version, tp, pp, num_layers=layers)
            elif args is not None:
                content["args"] = args
            if version:
                content["checkpoint_version"] = float(version)
            for chunk in range(chunks):
                start = (chunk * pp + stage) * per_chunk
                flat = rank_model(
                    model,
                    version=version,
                    spelling=spelling,
                    rank=rank,
                    tp=tp,
                    layers=range(start, start + per_chunk),
                    first=stage == 0 and chunk == 0,
                    last=stage == pp - 1 and chunk == chunks - 1,
                )
                key = "model" if chunks == 1 else f"model{chunk}"
                content[key] = nest(flat) if nested else flat
            if edit is not None:
                edit(content, rank, stage)
            folder = f"mp_rank_{rank:02d}" if pp == 1 else f"mp_rank_{rank:02d}_{stage:03d}"
            file = root / name / folder / "model_optim_rng.pt"
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
    word = "release" if iteration is None else str(iteration)
    (root / "latest_checkpointed_iteration.txt").write_text(word)
    return root


def assert_reads_as(
    path: Path, model: dict[str, torch.Tensor] | None = None, **kwargs: object
) -> CanonicalState:
    """The state of a directory, bit-equal to the model (None: random_model())."""
    model = random_model() if model is None else model
    state = megatron.read(path, **kwargs)
    assert set(state.tensors) == set(model)
    for name, tensor in model.items():
        full = state.full(name)
        assert full.shape == state.tensors[name].shape, name
        assert torch.equal(full, tensor), name
    return state


def edit_models(change: Callable[[dict], object]) -> Callable[[dict, int, int], None]:
    """An `edit` for write_megatron that changes the flat or nested model of every file."""

    def edit(content, rank, stage):
        change(content["model"])

    return edit

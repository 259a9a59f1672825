"""NeMo's names: Megatron's behind a prefix, and the classifiers of its fine-tuned models.

bert_model.language_model...            NeMo 1.0 to 1.4
model.language_model...                 NeMo 1.5 on; inside fine-tuned models bert_model.model...
classifier.mlp.layer0, layer2, ...      linear layers; odd numbers are the activations
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpcore.checkpoint.errors import CheckpointError, shown
from tpcore.checkpoint.formats.nemo_config import args_of, contents_of
from tpcore.checkpoint.names import MAX_HIDDEN_LAYERS
from tpcore.checkpoint.untrusted.unpickle import InertStub

_MAX_DEPTH = 16

_ENCODER = re.compile(
    r"(?P<prefix>(?:bert_model\.)?(?P<modern>model\.)?)"
    r"(?P<name>(?:module\.)?(?:language_model|lm_head|binary_head|embedding|encoder|pooler|"
    r"output_layer|word_embeddings_for_head)\..+)"
)
_CLASSIFIER = re.compile(r"classifier\.mlp\.layer(\d{1,2})\.(weight|bias)")
_OTHER_HEADS = {
    "intent and slot": re.compile(r"classifier\.(intent|slot)_mlp\..+"),
    "punctuation and capitalization": re.compile(r"(punct|capit)_classifier\..+"),
    "regression over pairs": re.compile(r"similarity_regressor\..+"),
}
_DROPPED = re.compile(
    r"(.+[._])?loss\.(.+\.)?(weight|pos_weight)"  # class weights of the training loss
    r"|(.+\.)?\w*(classification_report|metric|perplexity|f1|accuracy)\w*\..+"  # running counts
    r"|(.+\.)?position_ids"
)
_TASKS = ("sequence_classification", "token_classification", "question_answering")


@dataclass(frozen=True)
class NemoWeights:
    """A state dict of NeMo's in Megatron's names."""

    model: dict[str, Any]
    modern: bool
    """NeMo 1.5 or newer, which keeps q/k/v in version 3's order."""
    other_head: str | None
    """A head that tpcore does not have; its parameters are left out."""
    dropped: tuple[str, ...]


def is_nemo(state: Mapping[Any, Any]) -> bool:
    """Whether a dict is the state dict of one of NeMo's models."""
    return any(
        isinstance(key, str)
        and re.match(r"(bert_model\.|model\.(language_model|embedding)\.)", key)
        for key in state
    )


def translate(state: Mapping[Any, Any], task: str | None, where: str) -> NemoWeights:
    """Take NeMo's prefixes away, and give the classifier the names that `names.MEGATRON` has.

    Args:
        state: the state dict.
        task: what the classifier is for, one of the names of `state.HEADS`, where that is known.
        where: the file, for errors.

    Raises:
        CheckpointError: there is a classifier, and nothing says what for; or it is too deep.
    """
    model: dict[str, Any] = {}
    layers: dict[int, dict[str, Any]] = {}
    dropped: list[str] = []
    modern, other_head = False, None
    for key, value in state.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{where}: has a key that is no string: {shown(key)}")
        encoder, classifier = _ENCODER.fullmatch(key), _CLASSIFIER.fullmatch(key)
        other = next((name for name, p in _OTHER_HEADS.items() if p.fullmatch(key)), None)
        if encoder:
            name = encoder["name"]
            modern = modern or encoder["modern"] is not None
            if name in model:
                raise CheckpointError(f"{where}: {name:.80} is there twice")
            model[name] = value
        elif classifier:
            layers.setdefault(int(classifier[1]), {})[classifier[2]] = value
        elif other:
            other_head = other
        elif _DROPPED.fullmatch(key):
            dropped.append(key)
        else:
            model[key] = value  # unknown: the table that is looked up next says so
    for name, part in _classifier(layers, task, where).items():
        model.update({f"{name}.{kind}": value for kind, value in part.items()})
    return NemoWeights(model, modern, other_head, tuple(dropped))


def _classifier(
    layers: Mapping[int, dict[str, Any]], task: str | None, where: str
) -> dict[str, dict[str, Any]]:
    """Parameters of a classifier's linear layers, by their names in `names.MEGATRON`."""
    if not layers:
        return {}
    if sorted(layers) != [2 * n for n in range(len(layers))]:
        raise CheckpointError(
            f"{where}: a classifier has the layers {sorted(layers)}; expected 0, 2, 4, ... without "
            "a gap"
        )
    if len(layers) > MAX_HIDDEN_LAYERS + 1:
        raise CheckpointError(
            f"{where}: a classifier has {len(layers)} layers; at most {MAX_HIDDEN_LAYERS + 1} are "
            "supported"
        )
    if task not in _TASKS:
        raise CheckpointError(
            f"{where}: holds a classifier, and nothing says what for; read the .nemo file, whose "
            "configuration says it, not its weights alone"
        )
    last = 2 * (len(layers) - 1)
    named = {f"head_hidden.{n // 2}": part for n, part in layers.items() if n != last}
    key = "question_answering_head" if task == "question_answering" else "classification_head"
    return {**named, key: layers[last]}


def content_of(weights: NemoWeights, args: Mapping[str, Any], version: Any) -> dict[str, Any]:
    """What a file of Megatron's with these weights would hold."""
    args = dict(args)
    if weights.other_head is not None:
        args["tpcore_head"] = weights.other_head
    if not weights.modern and "onnx_safe" not in args and "openai_gelu" not in args:
        args["onnx_safe"] = True  # what NeMo 1.0 to 1.4 forced on every model
    return {
        "model": weights.model,
        "args": args,
        "checkpoint_version": 3.0 if weights.modern and version is None else version,
    }


def unwrap(content: Any, where: str) -> Any:
    """A checkpoint of NeMo's or Lightning's as one of Megatron's; anything else as it is.

    Raises:
        CheckpointError: as `translate`.
    """
    if not isinstance(content, dict) or "model" in content:
        return content
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not is_nemo(state):
        return content
    settings = _plain(content.get("hyper_parameters"))
    settings = settings.get("cfg", settings) if isinstance(settings, dict) else {}
    settings = settings if isinstance(settings, dict) else {}
    about = contents_of(settings)
    weights = translate(state, about.task, where)
    unwrapped = content_of(weights, args_of(about, where), content.get("checkpoint_version"))
    if isinstance(content.get("global_step"), int):
        unwrapped["iteration"] = content["global_step"]
    return unwrapped


def _plain(value: Any, depth: int = 0) -> Any:
    """Settings that were pickled as OmegaConf's nodes, of which only the state was kept."""
    if depth > _MAX_DEPTH:
        return None
    if isinstance(value, InertStub):
        inner = value.pickled_state if isinstance(value.pickled_state, dict) else {}
        return _plain(inner.get("_content", inner.get("_val")), depth + 1)
    if isinstance(value, dict):
        return {key: _plain(v, depth + 1) for key, v in value.items() if isinstance(key, str)}
    if isinstance(value, list):
        return [_plain(item, depth + 1) for item in value]
    return value


def key_of(name: str, num_layers: int) -> str:
    """NeMo's key for a name of `names.MEGATRON`, with a classifier of so many layers."""
    hidden = re.fullmatch(r"head_hidden\.(\d)\.(weight|bias)", name)
    if hidden:
        return f"classifier.mlp.layer{2 * int(hidden[1])}.{hidden[2]}"
    last = re.fullmatch(r"(?:question_answering|classification)_head\.(weight|bias)", name)
    if last:
        return f"classifier.mlp.layer{2 * (num_layers - 1)}.{last[1]}"
    return f"bert_model.{name}"

"""From a YAML file and dotted overrides to a checked `TrainConfig`.

An unknown key, a value of the wrong type or a missing one is a `ConfigError` of one line that
names the key, where it was set, and the way out.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import tpcore.train.config as config_module
from tpcore.train.config import ConfigError, TrainConfig, check_values, shown_source

# What users of NeMo and Lightning write and tpcore decides elsewhere: told where, not guessed.
_ELSEWHERE = {
    "trainer.gpus": "the number of ranks is torchrun's --nproc-per-node",
    "trainer.devices": "the number of ranks is torchrun's --nproc-per-node",
    "trainer.num_nodes": "the number of nodes is torchrun's --nnodes",
    "trainer.strategy": "there is one strategy; set model.tensor_model_parallel_size",
    "trainer.amp_level": "set trainer.precision",
    "model.classifier_head.num_output_layers": "the classifier is one layer on the pooled output",
    "model.dataset.do_lower_case": "set model.tokenizer.do_lower_case",
    "model.dataset.use_cache": "encoded data is never cached on disk; remove the key",
    "model.optim.sched.max_steps": "set trainer.max_steps or trainer.max_epochs",
}
_ELSEWHERE |= {
    f"model.{part}.shuffle": "evaluation has no order; remove the key"
    for part in ("validation_ds", "test_ds")
}
_NOT_READ = {"num_workers", "pin_memory", "drop_last"}


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file, apply overrides, check everything that can be checked without data.

    Args:
        path: YAML file; None: defaults only.
        overrides: `dotted.key=value` strings, the value in YAML syntax; the last one wins.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest known one), wrong type or
            value, missing value.
    """
    merged = OmegaConf.structured(TrainConfig)
    sources: dict[str, str] = {}  # key -> where it was set
    missing: set[str] = set()  # keys that were set to ???
    if path is not None:
        content, lines = _read_yaml(Path(path))
        merged = _merge(
            merged, content, sources, missing, lambda key: f"{path}:{_line_of(key, lines)}"
        )
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"{override!r} is not of the form key=value, as model.optim.lr=5e-5")
        try:
            content = OmegaConf.from_dotlist([f"{key}={text}"])
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"{override!r} (command line): {_one_line(error)}") from error
        merged = _merge(merged, content, sources, missing, lambda _: "command line")
    try:
        missing |= {str(key) for key in OmegaConf.missing_keys(merged)}
        if missing:
            names = ", ".join(sorted(missing))
            where = f" ({path})" if path is not None else ""
            raise ConfigError(f"no value for {names}{where}; add it, or pass {min(missing)}=...")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "configuration")
        raise ConfigError(f"{key}{shown_source(key, sources)}: {_one_line(error)}") from error
    assert isinstance(config, TrainConfig)
    check_values(config, sources)
    return config


def save_config(config: TrainConfig, path: str | Path) -> str:
    """The YAML text of `config`, written to `path`; `load_config` reads it back."""
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    Path(path).write_text(text, encoding="utf-8")
    return text


def describe_keys() -> Iterator[tuple[str, str, str]]:
    """(dotted key, default, documentation) of every key, in the order of the dataclasses."""
    docs = _attribute_docstrings()
    for key, owner, field in _fields(TrainConfig):
        default = field.default
        if default is dataclasses.MISSING:
            assert field.default_factory is not dataclasses.MISSING
            default = field.default_factory()
        text = yaml.safe_dump(default, default_flow_style=True).removesuffix("...\n").strip()
        yield key, text, docs[owner.__name__, field.name]


def _attribute_docstrings() -> dict[tuple[str, str], str]:
    """(class, field) -> the string that follows the field in the source of config.py.

    A class that inherits a field inherits its documentation.
    """
    docs: dict[tuple[str, str], str] = {}
    for node in ast.parse(inspect.getsource(config_module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for base in node.bases:
            inherited = {key: doc for key, doc in docs.items() if key[0] == ast.unparse(base)}
            docs |= {(node.name, name): doc for (_, name), doc in inherited.items()}
        for statement, following in itertools.pairwise(node.body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                docs[node.name, ast.unparse(statement.target)] = " ".join(
                    str(following.value.value).split()
                )
    return docs


def _fields(cls: type, prefix: str = "") -> Iterator[tuple[str, type, dataclasses.Field[Any]]]:
    """(dotted key, dataclass, field) of every key that holds a value."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _fields(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", cls, field


def _read_yaml(path: Path) -> tuple[DictConfig, dict[str, int]]:
    """The content and the line number of every dotted key."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text)
        # A bare scalar is no configuration to OmegaConf, and not even an error of its own.
        content = OmegaConf.create(text) if root is None or _is_mapping(root) else None
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not a YAML file: {_one_line(error)}") from error
    if not isinstance(content, DictConfig) or not (root is None or _is_mapping(root)):
        raise ConfigError(f"{path}: expected a mapping of keys to values at the top")
    lines: dict[str, int] = {}

    def walk(node: yaml.Node, prefix: str) -> None:
        for key, value in node.value:
            if key.tag not in _TEXT_TAGS:
                raise ConfigError(
                    f"{path}:{key.start_mark.line + 1}: the key {_shown(key)} is not a text to "
                    "YAML (on, off, yes and no are true and false); put it in quotes or remove it"
                )
            lines[f"{prefix}{key.value}"] = key.start_mark.line + 1
            if _is_mapping(value):
                walk(value, f"{prefix}{key.value}.")

    if root is not None:
        walk(root, "")
    return content, lines


_TEXT_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


def _shown(key: yaml.Node) -> str:
    return str(key.value) if isinstance(key, yaml.ScalarNode) else "in brackets"


def _is_mapping(node: yaml.Node) -> bool:
    return isinstance(node, yaml.MappingNode)


def _line_of(key: str, lines: Mapping[str, int]) -> int:
    """The line of `key`, or of the innermost of its parents that the file names."""
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return lines.get(key, 1)


def _merge(
    base: DictConfig,
    content: Any,
    sources: dict[str, str],
    missing: set[str],
    where: Callable[[str], str],
) -> DictConfig:
    """`base` with `content` over it; `sources` and `missing` follow what was set."""
    items = list(_check_keys(OmegaConf.to_container(content), TrainConfig, "", where))
    for key, value in items:
        if isinstance(value, list) and key == "model.language_model.config":
            # OmegaConf has no error of its own for this.
            raise ConfigError(
                f"{key} ({where(key)}) is {value!r}; expected a mapping of names to values"
            )
        sources[key] = where(key)
        missing.discard(key)
        if value == MISSING:
            missing.add(key)
    try:
        merged = OmegaConf.merge(base, content)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "configuration")
        raise ConfigError(f"{key} ({where(key)}): {_one_line(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _check_keys(
    content: Any, cls: type, prefix: str, where: Callable[[str], str]
) -> Iterator[tuple[str, Any]]:
    """The dotted keys and values of `content`, which is walked beside the dataclasses."""
    hints = get_type_hints(cls)
    for name, value in content.items():
        key = f"{prefix}{name}"
        if name not in hints:
            while isinstance(value, dict) and len(value) == 1:
                child, value = next(iter(value.items()))
                key = f"{key}.{child}"
            raise ConfigError(f"unknown key {key} ({where(key)}); {_suggestion(key)}")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, dict):
                shown = "null" if value is None else repr(value)
                children = ", ".join(f"{key}.{child}" for child in get_type_hints(hints[name]))
                raise ConfigError(f"{key} ({where(key)}) is {shown}, but it holds keys: {children}")
            yield from _check_keys(value, hints[name], f"{key}.", where)
        else:
            yield key, value


def _suggestion(key: str) -> str:
    if key in _ELSEWHERE:
        return _ELSEWHERE[key]
    parent, _, leaf = key.rpartition(".")
    if leaf in _NOT_READ:
        return "data is held in memory, so there is nothing to set; remove the key"
    known = [name for name, _, _ in _fields(TrainConfig)]
    sections = {known_key.rpartition(".")[0] for known_key in known}
    known += sorted(section for section in sections if section)
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    near = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)
    if near:
        return f"did you mean {siblings[near[0]]}?"
    # The right name in the wrong place (optim.lr), then the whole key misspelt (modl.optim.lr).
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    candidates = same_leaf if same_leaf else [] if parent in known else known
    near = difflib.get_close_matches(key, candidates, n=1, cutoff=0.0 if same_leaf else 0.6)
    if near:
        return f"did you mean {near[0]}?"
    if siblings:
        return f"known {f'in {parent}' if parent else 'there'}: {', '.join(sorted(siblings))}"
    return "`tpcore finetune --help-config` lists all keys"


def _one_line(error: Exception) -> str:
    """The first line of a message of OmegaConf or PyYAML; the rest repeats key and types."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, yaml.YAMLError):
        return " ".join(lines)
    return lines[0] if lines else type(error).__name__

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

import tpcore.tasks.masked_settings as masked_settings_module
import tpcore.tasks.sections as sections_module
import tpcore.tasks.settings as settings_module
import tpcore.tasks.word_settings as word_settings_module
import tpcore.train.config as config_module
from tpcore.tasks.settings import SECTIONS
from tpcore.train.config import (
    ConfigError,
    TrainConfig,
    check_values,
    config_class,
    shown_source,
)

# What users of NeMo and Lightning write and tpcore decides elsewhere: told where, not guessed.
_ELSEWHERE = {
    "trainer.gpus": "the number of ranks is torchrun's --nproc-per-node",
    "trainer.devices": "the number of ranks is torchrun's --nproc-per-node",
    "trainer.num_nodes": "the number of nodes is torchrun's --nnodes",
    "trainer.strategy": "set model.tensor_model_parallel_size and trainer.data_parallel",
}

_NO_MEANING = {
    "trainer.amp_level": "trainer.precision says it all",
    "trainer.amp_backend": "trainer.precision says it all",
    "trainer.logger": "set exp_manager.create_tensorboard_logger",
    "trainer.checkpoint_callback": "set exp_manager.checkpoint_callback_params",
    "trainer.enable_checkpointing": "set exp_manager.checkpoint_callback_params",
    "trainer.progress_bar_refresh_rate": "set trainer.enable_progress_bar",
    "trainer.enable_model_summary": "`tpcore plan` tells the sizes",
    "trainer.weights_summary": "`tpcore plan` tells the sizes",
    "trainer.replace_sampler_ddp": "every rank always reads its own share",
    "trainer.use_distributed_sampler": "every rank always reads its own share",
    "trainer.num_sanity_val_steps": "data is checked before the run",
    "trainer.gradient_clip_algorithm": "it is always the global norm",
    "trainer.benchmark": "there are no convolutions",
    "trainer.sync_batchnorm": "there are no batch norms",
    "trainer.prepare_data_per_node": "nothing is downloaded",
    "trainer.flush_logs_every_n_steps": "logs are written at once",
    "trainer.default_root_dir": "set exp_manager.exp_dir",
}
"""Keys of Lightning's Trainer in NeMo's files that change nothing here, with the reason why."""


def load_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    note: Callable[[str], None] = lambda _: None,
) -> TrainConfig:
    """Read a YAML file, apply overrides, check everything that can be checked without data.

    Args:
        path: YAML file; None: defaults only.
        overrides: `dotted.key=value` strings, the value in YAML syntax; the last one wins.
        note: called with one line for each key of NeMo's that changes nothing here.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest known one), wrong type or
            value, missing value.
    """
    parts: list[tuple[DictConfig, Callable[[str], str]]] = []  # contents, places of their keys
    if path is not None:
        content, lines = _read_yaml(Path(path))
        parts.append((content, lambda key: f"{path}:{_line_of(key, lines)}"))
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"{override!r} is not of the form key=value, as model.optim.lr=5e-5")
        try:
            parts.append((OmegaConf.from_dotlist([f"{key}={text}"]), lambda _: "command line"))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"{override!r} (command line): {_one_line(error)}") from error
    cls = _class_for(parts)
    if cls is TrainConfig:
        where = f" ({path})" if path is not None else ""
        raise ConfigError(
            f"no value for task{where}; add it, or pass task=...: {', '.join(SECTIONS)}"
        )
    merged = OmegaConf.structured(cls)
    for key, value in _task_defaults(cls).items():
        OmegaConf.update(merged, key, value)
    sources: dict[str, str] = {}  # key -> where it was set
    missing: set[str] = set()  # keys that were set to ???
    for content, place in parts:
        merged = _merge(merged, content, cls, sources, missing, place, note)
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


def flatten(config: TrainConfig) -> dict[str, Any]:
    """The values of all keys, by their dotted names."""
    values = {}
    for key, _, _ in _fields(type(config)):
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        values[key] = value
    return values


def _class_for(parts: Sequence[tuple[DictConfig, Callable[[str], str]]]) -> type[TrainConfig]:
    """The configuration of the task that the last of `parts` to name one names.

    Raises:
        ConfigError: there is no such task.
    """
    for content, where in reversed(parts):
        task = OmegaConf.to_container(content).get("task")  # type: ignore[union-attr]
        if task is None or task == MISSING:
            continue
        if str(task) not in SECTIONS:
            near = difflib.get_close_matches(str(task), SECTIONS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"task={task!r} ({where('task')}): expected one of {', '.join(SECTIONS)}{hint}"
            )
        return config_class(str(task))
    return TrainConfig


def _task_defaults(cls: type[TrainConfig]) -> Mapping[str, Any]:
    defaults: Mapping[str, Any] = get_type_hints(cls)["model"].defaults
    return defaults


def describe_keys(task: str | None = None) -> Iterator[tuple[str, str, str]]:
    """(dotted key, default, documentation) of every key, in the order of the dataclasses.

    Without a task: of all tasks. A key that not every task has, or not with the same default and
    documentation, is followed by the names of those it belongs to, in brackets.
    """
    docs = _attribute_docstrings()
    tasks = list(SECTIONS) if task is None else [task]
    owners: dict[tuple[str, str, str], list[str]] = {}
    for name in tasks:
        cls = config_class(name)
        defaults = _task_defaults(cls)
        for key, owner, field in _fields(cls):
            default = field.default
            if default is dataclasses.MISSING:
                assert field.default_factory is not dataclasses.MISSING
                default = field.default_factory()
            default = defaults.get(key, default)
            text = yaml.safe_dump(default, default_flow_style=True).removesuffix("...\n").strip()
            owners.setdefault((key, text, docs[owner.__name__, field.name]), []).append(name)
    # Sections of one name together, wherever the task that brought them stands.
    order = {
        section: i for i, section in enumerate(dict.fromkeys(_section(k) for k, _, _ in owners))
    }
    for entry in sorted(owners, key=lambda entry: order[_section(entry[0])]):
        key, text, doc = entry
        names = "" if len(owners[entry]) == len(tasks) else f" [{', '.join(owners[entry])}]"
        yield key, text, f"{doc}{names}"


def _section(key: str) -> str:
    return key.rpartition(".")[0]


def _attribute_docstrings() -> dict[tuple[str, str], str]:
    """(class, field) -> the string that follows the field in the source of its module.

    A class that inherits a field inherits its documentation.
    """
    docs: dict[tuple[str, str], str] = {}
    modules = (
        sections_module,
        word_settings_module,
        masked_settings_module,
        settings_module,
        config_module,
    )
    for node in [node for m in modules for node in ast.parse(inspect.getsource(m)).body]:
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
            owner = next(c for c in cls.__mro__ if field.name in inspect.get_annotations(c))
            yield f"{prefix}{field.name}", owner, field


def _read_yaml(path: Path) -> tuple[DictConfig, dict[str, int]]:
    """The content and the line number of every dotted key."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text)
        # A bare scalar is no configuration to OmegaConf, and not even an error of its own.
        content = OmegaConf.create(text) if root is None or _is_mapping(root) else None
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not a configuration: brackets within brackets") from error
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
    cls: type[TrainConfig],
    sources: dict[str, str],
    missing: set[str],
    where: Callable[[str], str],
    note: Callable[[str], None],
) -> DictConfig:
    """`base` with `content` over it; `sources` and `missing` follow what was set."""
    container = OmegaConf.to_container(content)
    for line in _remove_without_meaning(container, cls, where):
        note(line)
    content = OmegaConf.create(container)
    items = list(_check_keys(container, cls, "", where, cls))
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


def _remove_without_meaning(
    content: Any, cls: type[TrainConfig], where: Callable[[str], str]
) -> Iterator[str]:
    """Take the keys out of `content` that change nothing for a task; a line for each."""
    of_task: Mapping[str, str] = get_type_hints(cls)["model"].no_meaning
    table = _NO_MEANING | {f"model.{key}": reason for key, reason in of_task.items()}
    for key, reason in table.items():
        *path, leaf = key.split(".")
        sections = [content]
        for name in path:
            sections.append(sections[-1].get(name) if isinstance(sections[-1], dict) else None)
        if isinstance(sections[-1], dict) and leaf in sections[-1]:
            value = sections[-1].pop(leaf)
            # A section of nothing but such keys may be one that does not exist here.
            for parent, name in zip(reversed(sections[:-1]), reversed(path), strict=True):
                if not parent[name]:
                    del parent[name]
            shown = "null" if value is None else str(value)
            yield f"{key}={shown} ({where(key)}) changes nothing: {reason}"


def _check_keys(
    content: Any,
    cls: type,
    prefix: str,
    where: Callable[[str], str],
    root: type[TrainConfig],
) -> Iterator[tuple[str, Any]]:
    """The dotted keys and values of `content`, which is walked beside the dataclasses."""
    hints = get_type_hints(cls)
    for name, value in content.items():
        key = f"{prefix}{name}"
        if name not in hints:
            while isinstance(value, dict) and len(value) == 1:
                child, value = next(iter(value.items()))
                key = f"{key}.{child}"
            raise ConfigError(f"unknown key {key} ({where(key)}); {_suggestion(key, root)}")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, dict):
                shown = "null" if value is None else repr(value)
                fields = dataclasses.fields(hints[name])
                children = ", ".join(f"{key}.{field.name}" for field in fields)
                raise ConfigError(f"{key} ({where(key)}) is {shown}, but it holds keys: {children}")
            yield from _check_keys(value, hints[name], f"{key}.", where, root)
        else:
            yield key, value


def _suggestion(key: str, cls: type[TrainConfig]) -> str:
    if key in _ELSEWHERE:
        return _ELSEWHERE[key]
    parent, _, leaf = key.rpartition(".")
    known = [name for name, _, _ in _fields(cls)]
    elsewhere = ""
    for task in SECTIONS if cls is not TrainConfig else ():
        if not elsewhere and any(k == key for k, _, _ in _fields(config_class(task))):
            elsewhere = f"it belongs to task={task}"
    sections = {known_key.rpartition(".")[0] for known_key in known}
    known += sorted(section for section in sections if section)
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    near = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)
    if near:
        return f"{elsewhere}{', ' if elsewhere else ''}did you mean {siblings[near[0]]}?"
    if elsewhere:
        return elsewhere
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
    if lines and lines[0].endswith("is not a ListConfig, TupleConfig, list, or tuple."):
        return "expected a list, as [a, b]"
    return lines[0] if lines else type(error).__name__

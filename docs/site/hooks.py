"""What the site needs beyond mkdocs: formulas without scripts, and a place for every page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> Any:
    """Turn the fence ```math, which GitHub draws as well, into MathML while the site is built."""
    fence = {"name": "math", "class": "math", "format": _formulas}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    others = sorted({page.name for page in Path(config.docs_dir).glob("*.md")} - _named(config.nav))
    if others:
        config.nav.append({"More": others})
    return config


def _named(nav: Any) -> set[str]:
    if isinstance(nav, str):
        return {nav}
    return set().union(*map(_named, nav.values() if isinstance(nav, dict) else nav))


def _formulas(source: str, *_: Any, **__: Any) -> str:
    rows = [row for row in source.split("\\\\") if row.strip()]
    return "".join(f'<div class="formula">{convert(row, display="block")}</div>' for row in rows)

"""The page of a run: HTML with its style and SVG inside, no script, nothing from outside.

Curves are drawn small (their text is readable on a phone) and grow with the page.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

Curve = list[tuple[int, float]]
"""(optimizer step, value) in order."""

MAX_POINTS = 300
"""Of one line; more are thinned out to means."""
_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 10, 24
_MANY_CLASSES = 12
"""A matrix of more has no numbers in its cells."""


@dataclass(frozen=True)
class ReportData:
    """Everything that the page shows."""

    name: str
    version: str
    task: str
    finished: bool
    headline: Mapping[str, str]
    """What -> number, at the top of the page."""
    curves: Mapping[str, Curve]
    best: Mapping[str, float]
    """Metrics of the best checkpoint, and of the test set."""
    test: Mapping[str, float]
    review: Mapping[str, Any]
    """As `tpcore.tasks.review`, with where it is from; empty: no validation yet."""
    config_text: str
    environment: Mapping[str, Any]
    """Of the last start."""
    num_starts: int


def draw(data: ReportData) -> str:
    """The page."""
    style = files("tpcore.train").joinpath("report.css").read_text(encoding="utf-8")
    title = f"{data.name} / {data.version}"
    state = "finished" if data.finished else "not finished"
    parts = [
        _tiles(data.headline),
        _charts(data.curves),
        _scores(data),
        _confusion(data.review.get("confusion")),
        _worst(data.review),
        _details("Configuration", f"<pre>{html.escape(data.config_text)}</pre>"),
        _environment(data),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f'<header><p class="over">{html.escape(data.task.replace("_", " "))}</p>'
        f"<h1>{html.escape(data.name)}</h1>"
        f'<p class="sub">{html.escape(data.version)}'
        f'<span class="state {"done" if data.finished else "open"}">{state}</span></p></header>\n'
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, body: str, note: str = "") -> str:
    note = f'<p class="note">{note}</p>' if note else ""
    return f"<section>\n<h2>{html.escape(title)}</h2>{note}\n{body}\n</section>"


def _details(title: str, body: str) -> str:
    return f"<details>\n<summary>{html.escape(title)}</summary>\n{body}\n</details>"


def _tiles(headline: Mapping[str, str]) -> str:
    tiles = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in headline.items()
    )
    return f'<dl class="tiles">{tiles}</dl>' if tiles else ""


# --- curves ---------------------------------------------------------------------------------------


def _charts(curves: Mapping[str, Curve]) -> str:
    overall = [
        name
        for name in curves
        if name.startswith("val_") and "/" not in name and name != "val_loss"
    ]
    groups: list[tuple[str, list[str]]] = [("Loss", ["train_loss", "val_loss"])]
    # Metrics of one range share a picture; SQuAD's percentages and counts have their own.
    unit = [name for name in overall if all(0 <= v <= 1 for _, v in curves[name])]
    groups += [("Validation", unit[:4])] if unit else []
    groups += [(name, [name]) for name in overall if name not in unit][:4]
    groups += [
        ("Learning rate", ["lr"]),
        ("Gradient norm", ["grad_norm"]),
        ("Tokens per second", ["tokens_per_s"]),
    ]
    last = max((points[-1][0] for points in curves.values() if points), default=0)
    drawn = []
    for title, names in groups:
        lines = {name: curves[name] for name in names if curves.get(name)}
        if lines:
            drawn.append(_chart(title, lines, last))
    return _section("Curves", f'<div class="charts">{"".join(drawn)}</div>') if drawn else ""


def _chart(title: str, lines: Mapping[str, Curve], last_step: int) -> str:
    values = [value for points in lines.values() for _, value in points]
    low, high = min(values), max(values)
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / max(last_step, 1)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    parts = []
    for tick in ticks:
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" '
            f'y2="{y(tick):.1f}"/>'
            f'<text class="axis" x="{_LEFT - 6}" y="{y(tick) + 3:.1f}" text-anchor="end">'
            f"{_number(tick)}</text>"
        )
    for step in nice_ticks(0, last_step, 4):
        if step == int(step) and step <= last_step:
            parts.append(
                f'<text class="axis" x="{x(step):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">'
                f"{int(step):,}</text>"
            )
    for number, (name, points) in enumerate(lines.items()):
        parts.append(_line(name, points, number, x, y))
    legend = "".join(
        f'<span class="key c{number}">{html.escape(name)}<b>{_number(points[-1][1])}</b></span>'
        for number, (name, points) in enumerate(lines.items())
    )
    label = html.escape(f"{title} by optimizer step")
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f'{"".join(parts)}</svg><p class="legend">{legend}</p></figure>'
    )


def _line(name: str, points: Curve, number: int, x: Any, y: Any) -> str:
    thin = thinned(points)
    path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in thin)
    marks = ""
    if len(points) <= 40:
        marks = "".join(
            f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.2">'
            f"<title>{html.escape(name)} {_number(value)} at step {step:,}</title></circle>"
            for step, value in points
        )
    return f'<g class="series c{number}"><polyline points="{path}"/>{marks}</g>'


def thinned(points: Curve) -> list[tuple[float, float]]:
    """At most about MAX_POINTS points: means of neighbours, each at their mean step."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return [(float(step), value) for step, value in points]
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(s for s, _ in group) / len(group), sum(v for _, v in group) / len(group))
        for group in groups
    ]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers, about `count` of them, from at most `low` to at least `high`."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _number(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# --- tables ---------------------------------------------------------------------------------------


def _scores(data: ReportData) -> str:
    """Scores of classes or entity types: the metrics called f1/<name> and so on."""
    where = "the test set" if any("/" in name for name in data.test) else "validation"
    metrics = data.test if where == "the test set" else data.best or _latest(data.curves)
    rows: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        measure, slash, label = name.partition("/")
        if slash:
            rows.setdefault(label, {})[measure.removeprefix("val_").removeprefix("test_")] = value
    if not rows:
        return ""
    measures = list(dict.fromkeys(measure for row in rows.values() for measure in row))
    head = "".join(f"<th>{html.escape(measure)}</th>" for measure in measures)
    body = "".join(
        f'<tr><th scope="row">{html.escape(label)}</th>'
        + "".join(_score(row.get(measure)) for measure in measures)
        + "</tr>"
        for label, row in rows.items()
    )
    of = "" if where == "the test set" or not data.best else ", best checkpoint"
    table = f'<table class="scores"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody>'
    return _section("Scores", f'<div class="scroll">{table}</table></div>', f"{where}{of}")


def _score(value: float | None) -> str:
    if value is None:
        return "<td></td>"
    share = min(max(value, 0.0), 1.0) * 100
    return f'<td><span class="bar" style="--share:{share:.1f}%">{_number(value)}</span></td>'


def _latest(curves: Mapping[str, Curve]) -> dict[str, float]:
    return {name: points[-1][1] for name, points in curves.items() if points and "/" in name}


def _confusion(confusion: Mapping[str, Any] | None) -> str:
    if not confusion:
        return ""
    labels, counts = confusion["labels"], confusion["counts"]
    numbered = len(labels) <= _MANY_CLASSES
    head = "".join(f'<th scope="col"><span>{html.escape(label)}</span></th>' for label in labels)
    rows = []
    for true, (label, row) in enumerate(zip(labels, counts, strict=True)):
        total = sum(row) or 1
        cells = []
        for predicted, count in enumerate(row):
            kind = "right" if predicted == true else "wrong"
            hint = html.escape(f"{label} taken for {labels[predicted]}: {count} of {sum(row)}")
            text = str(count) if numbered else ""
            share = max(100 * count / total, 15 if count else 0)  # a single one is seen
            cells.append(
                f'<td class="{kind}" style="--share:{share:.0f}%" title="{hint}">{text}</td>'
            )
        rows.append(f'<tr><th scope="row">{html.escape(label)}</th>{"".join(cells)}</tr>')
    table = (
        f'<table class="confusion"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    note = "rows: the true class; columns: the predicted one; the last validation"
    return _section("Confusion", f'<div class="scroll">{table}</div>', note)


def _worst(review: Mapping[str, Any]) -> str:
    if not review:
        return ""
    worst: Sequence[Mapping[str, Any]] = review.get("worst", [])
    note = (
        f"{html.escape(review['source'])}, {review['num_records']:,} records, after step "
        f"{review['step']:,}"
    )
    if not review.get("measure"):
        return ""
    if not worst:
        return _section("Worst examples", "<p>Nothing was wrong.</p>", note)
    items = "".join(_mistake(mistake) for mistake in worst)
    note += f"; by {html.escape(review['measure'])}"
    return _section("Worst examples", f'<ol class="worst">{items}</ol>', note)


def _mistake(mistake: Mapping[str, Any]) -> str:
    line = mistake.get("line")
    place = f"line {line}" if line is not None else ""
    return (
        f'<li><p class="text">{html.escape(mistake["text"])}</p><p class="pair">'
        f"<span><i>true</i> {html.escape(mistake['true'])}</span>"
        f'<span class="bad"><i>predicted</i> {html.escape(mistake["predicted"])}</span>'
        f'<span class="place"><b>{_number(mistake["error"])}</b> {place}</span></p></li>'
    )


def _environment(data: ReportData) -> str:
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>'
        for name, value in _flat(data.environment)
    )
    if not rows:
        return ""
    title = "Environment" if data.num_starts == 1 else f"Environment (start {data.num_starts})"
    return _details(title, f'<div class="scroll"><table class="facts">{rows}</table></div>')


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)

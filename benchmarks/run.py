"""Run the kernel benchmarks and write the table: CSV and Markdown, named by device and date."""

from __future__ import annotations

import csv
import datetime
import json
import operator
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tpcore import memory

HERE = Path(__file__).parent
COLUMNS = (
    "op",
    "regime",
    "direction",
    "dtype",
    "provider",
    "median_ms",
    "gb_per_s",
    "percent_of_copy",
    "vs_eager",
    "vs_compile",
)


def device_name() -> str:
    """The GPU's name, or the CPU's model and how many cores this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        text = Path("/proc/cpuinfo").read_text()
        model = re.findall(r"model name\s*:\s*(.*)", text)[0]
    except (OSError, IndexError):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def rows_of(report: dict) -> list[dict]:
    """One row for each case, with its ratio to the peers and to the copy of the same run."""
    rows = []
    for entry in report["benchmarks"]:
        info, median = entry["extra_info"], entry["stats"]["median"]
        rows.append(
            {
                "op": info["op"],
                "regime": info["regime"],
                "direction": info["direction"],
                "dtype": info["dtype"].removeprefix("torch."),
                "provider": info["provider"],
                "median_ms": median * 1e3,
                "gb_per_s": info["min_bytes"] / median / 1e9,
            }
        )
    case = operator.itemgetter("op", "regime", "direction", "dtype")
    copies = {(r["regime"], r["dtype"]): r["gb_per_s"] for r in rows if r["op"] == "copy"}
    times = {(*case(row), row["provider"]): row["median_ms"] for row in rows}
    for row in rows:
        copy = copies.get((row["regime"], row["dtype"]))
        row["percent_of_copy"] = 100 * row["gb_per_s"] / copy if copy else None
        for peer in ("eager", "compile"):
            peer_time = times.get((*case(row), peer))
            row[f"vs_{peer}"] = peer_time / row["median_ms"] if peer_time else None
    return rows


def markdown(rows: list[dict], title: str, facts: str) -> str:
    lines = [f"# {title}", "", facts, "", "| " + " | ".join(COLUMNS) + " |"]
    lines.append("|" + "---|" * len(COLUMNS))
    for row in rows:
        cells = [row[c] for c in COLUMNS]
        shown = [f"{c:.2f}" if isinstance(c, float) else ("" if c is None else c) for c in cells]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    memory.restart_process()  # one allocator policy for every provider and for the copy
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", str(HERE / "kernels.py"), "-q", "-m", ""]
        command += [f"--benchmark-json={report}", "--benchmark-columns=median", *sys.argv[1:]]
        status = subprocess.run(command, cwd=HERE.parent).returncode
        if status:
            return status
        rows = rows_of(json.loads(report.read_text()))
    device, date = device_name(), datetime.date.today().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    target = HERE / "results" / f"kernels_{slug}_{date}"
    target.parent.mkdir(exist_ok=True)
    facts = (
        f"torch {torch.__version__}, {date}; load average {load_before:.2f} before and "
        f"{os.getloadavg()[0]:.2f} after. `gb_per_s`: unavoidable bytes over the median time; "
        "`vs_*`: the peer's time over this one, so above 1 is faster than the peer. CPU memory: "
        f"{memory.memory_policy()}. Regimes: see benchmarks/kernels.py."
    )
    target.with_suffix(".md").write_text(markdown(rows, f"Kernels on {device}", facts))
    with target.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {target}.md and .csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())

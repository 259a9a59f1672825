"""What a run says: the console and its log file, metrics.jsonl, a progress bar, tables.

Only global rank 0 speaks; the other ranks hold a `RunLog` that does nothing.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

LOG_FILE = "log.txt"
METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Messages, metrics and progress of one run.

    Args:
        enabled: False: every method does nothing (ranks above 0).
        progress_bar: Show one where the console is a terminal; elsewhere a line now and then.
    """

    def __init__(self, *, enabled: bool = True, progress_bar: bool = True) -> None:
        self.enabled = enabled
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._show_bar = progress_bar and self.console.is_terminal
        self._before_folder: list[str] = []
        self._log_file: IO[str] | None = None
        self._metrics_file: IO[str] | None = None
        self._events: Any = None
        self._bar: Progress | None = None
        self._started, self._first_step = time.perf_counter(), 0

    def open_folder(self, folder: Path, *, tensorboard: bool = False, first_step: int = 1) -> None:
        """Write log.txt and metrics.jsonl from now on; what was said before goes there too.

        Args:
            folder: of the run.
            tensorboard: write event files too.
            first_step: of a resumed run: what TensorBoard has seen of later steps is void.
        """
        if not self.enabled:
            return
        if tensorboard:
            self._events = _event_writer(folder, first_step)
            if self._events is None:
                self.info("TensorBoard is not installed: no event files")
        self._log_file = (folder / LOG_FILE).open("a", encoding="utf-8", buffering=1)
        self._metrics_file = (folder / METRICS_FILE).open("a", encoding="utf-8", buffering=1)
        self._log_file.writelines(f"{line}\n" for line in self._before_folder)
        self._before_folder.clear()

    def info(self, text: str) -> None:
        """One message, or several lines of it."""
        if not self.enabled:
            return
        self.console.print(text, markup=False)
        self._write(text)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Messages of tpcore's own loggers go through `info` inside the block."""
        logger, handler = logging.getLogger("tpcore"), _Forward(self)
        logger.addHandler(handler)
        before, logger.propagate = logger.propagate, False
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.propagate = before

    def metrics(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; floats keep all their digits."""
        if not self.enabled:
            return
        if self._metrics_file is not None:
            self._metrics_file.write(json.dumps(record) + "\n")
        if self._events is not None:
            for name, value in record.items():
                if name not in ("step", "epoch"):
                    self._events.add_scalar(name, value, record["step"])

    def start_progress(self, total_steps: int, done: int = 0) -> None:
        """Begin the progress bar of a run, or of what is left of one after `done` steps."""
        self._started, self._first_step = time.perf_counter(), done
        if not (self.enabled and self._show_bar):
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            console=self.console,
        )
        self._bar.add_task("epoch 0", total=total_steps, completed=done, shown="")
        self._bar.start()

    def step(self, record: Mapping[str, Any], total_steps: int, *, line: bool) -> None:
        """Show one finished step: in the bar, or as a line of fixed columns if `line`.

        The time left is that of the steps so far, with what was between them (validation,
        checkpoints), for each step that is left.
        """
        if not self.enabled:
            return
        steps = max(1, record["step"] - self._first_step)
        left_s = (time.perf_counter() - self._started) / steps * (total_steps - record["step"])
        shown = (
            f"loss {record['train_loss']:8.4f} | lr {record['lr']:.2e} | "
            f"norm {record['grad_norm']:7.3f} | {record['tokens_per_s']:8.0f} tok/s"
        )
        if "mfu" in record:
            shown += f" | mfu {100 * record['mfu']:4.1f}%"
        if "memory_mib" in record:
            shown += f" | {record['memory_mib']:6.0f} MiB"
        shown += f" | {format_duration(left_s)} left"
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                completed=record["step"],
                description=f"epoch {record['epoch']}",
                shown=shown,
            )
        if not line:
            return
        width = len(str(total_steps))
        text = f"step {record['step']:{width}}/{total_steps} | epoch {record['epoch']} | {shown}"
        if self._bar is None:
            self.console.print(text, markup=False)
        self._write(text)

    def stop_progress(self) -> None:
        """Leave the progress bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """A table of two columns; in log.txt as plain lines."""
        if not self.enabled:
            return
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in rows:
            table.add_row(name, value)
        self.console.print(table, markup=False)
        self._write(title)
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            self._write(f"  {name:{width}}  {value}")

    def close(self) -> None:
        """End the bar and close the files."""
        self.stop_progress()
        if self._events is not None:
            self._events.close()
            self._events = None
        for file in (self._log_file, self._metrics_file):
            if file is not None:
                file.close()
        self._log_file = self._metrics_file = None

    def _write(self, text: str) -> None:
        if self._log_file is not None:
            self._log_file.write(text + "\n")
        else:
            self._before_folder.append(text)


def _event_writer(folder: Path, first_step: int) -> Any:
    """TensorBoard's writer, imported by nobody else: it takes a second. None: not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first_step)


class _Forward(logging.Handler):
    """Hands log records to a `RunLog`."""

    def __init__(self, log: RunLog) -> None:
        super().__init__()
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        self.log.info(record.getMessage())


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds: 0:02:07; days are hours above 23."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def format_metrics(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Rows of a table: the overall metrics, without those of single classes (`f1/spam`)."""
    return [(name, f"{value:.4f}") for name, value in metrics.items() if "/" not in name]

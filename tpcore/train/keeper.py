"""Which checkpoints are kept, and when a run has stopped improving."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from tpcore.train.checkpoint_files import Manifest, Progress


@dataclass(frozen=True)
class Kept:
    """One of the best checkpoints."""

    score: float
    filename: str
    metrics: Mapping[str, float]


@dataclass
class CheckpointKeeper:
    """Decides which checkpoints exist: the best `save_top_k` and the last.

    Args:
        name: start of the file names.
        monitor: metric and its better direction, "max" or "min".
        save_top_k: how many of the best to keep.
        save_last: whether to keep `<name>-last.ckpt`.
        name_steps: put the step into the names, for runs that validate within epochs.
    """

    name: str
    monitor: tuple[str, str]
    save_top_k: int
    save_last: bool
    name_steps: bool = False
    kept: list[Kept] = field(default_factory=list)
    """The best first; of equal scores the older one."""

    @property
    def last_filename(self) -> str:
        """Name of the latest checkpoint."""
        return f"{self.name}-last.ckpt"

    @property
    def best(self) -> Kept | None:
        """The best checkpoint so far."""
        return self.kept[0] if self.kept else None

    def update(
        self, progress: Progress, write: Callable[[str], None], remove: Callable[[str], None]
    ) -> None:
        """Call `write` and `remove` with the file names of what is new and what is surplus.

        The new file is there before an old one goes. A score that is not a number is never kept.
        """
        if self.save_top_k:
            self._update_best(progress, write, remove)
        if self.save_last:
            write(self.last_filename)

    def restore(self, found: Iterable[Manifest], remove: Callable[[str], None]) -> None:
        """Know again what a resumed run has kept; what was surplus when it was cut off goes."""
        for manifest in sorted(found, key=lambda manifest: manifest.global_step):
            if manifest.filename != self.last_filename and manifest.score is not None:
                self.kept.append(Kept(manifest.score, manifest.filename, manifest.metrics))
        self._sort_and_cut(remove)

    def _update_best(
        self, progress: Progress, write: Callable[[str], None], remove: Callable[[str], None]
    ) -> None:
        metric, _ = self.monitor
        score = progress.metrics[metric]
        full = len(self.kept) == self.save_top_k
        if score != score or (full and not self._is_better(score, self.kept[-1].score)):
            return
        # A metric of one class has a slash in its name.
        shown = metric.replace("/", "_")
        filename = f"{self.name}--{shown}={score:.2f}-epoch={progress.epoch}"
        filename += f"-step={progress.global_step}.ckpt" if self.name_steps else ".ckpt"
        write(filename)
        self.kept.append(Kept(score, filename, progress.metrics))
        self._sort_and_cut(remove)

    def _sort_and_cut(self, remove: Callable[[str], None]) -> None:
        sign = -1.0 if self.monitor[1] == "max" else 1.0
        self.kept.sort(key=lambda kept: sign * kept.score)  # stable: the older of equals is first
        for surplus in self.kept[self.save_top_k :]:
            remove(surplus.filename)
        del self.kept[self.save_top_k :]

    def _is_better(self, score: float, other: float) -> bool:
        return score > other if self.monitor[1] == "max" else score < other


@dataclass
class EarlyStopping:
    """Counts validations without improvement.

    Args:
        monitor: metric and its better direction.
        patience: so many of them in a row end the run.
        min_delta: a score must be better than the best by more than this.
    """

    monitor: tuple[str, str]
    patience: int
    min_delta: float = 0.0
    best: float | None = None
    num_bad: int = 0

    def update(self, metrics: Mapping[str, float]) -> None:
        """Follow one validation."""
        score = metrics[self.monitor[0]]
        sign = 1.0 if self.monitor[1] == "max" else -1.0
        if score == score and (self.best is None or sign * (score - self.best) > self.min_delta):
            self.best, self.num_bad = score, 0
        else:
            self.num_bad += 1

    @property
    def is_due(self) -> bool:
        """Whether the run is to end."""
        return self.num_bad >= self.patience

    def state_dict(self) -> dict[str, float | None]:
        """What a resumed run needs."""
        return {"best": self.best, "num_bad": self.num_bad}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Continue from `state`."""
        self.best, self.num_bad = state["best"], int(state["num_bad"] or 0)

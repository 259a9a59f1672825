"""Learning-rate schedules under the names that NeMo gave them. Plain arithmetic: no torch.

In every formula `step` counts optimizer updates from 0, `w` is the number of warm-up steps, `m`
the number of steps of the whole run, `lr` the peak learning rate. Until the warm-up ends,
`step <= w`, all of them rise linearly:

    lr * (step + 1) / (w + 1)

so that the first update is never lost and the peak is reached at `step = w`. Beyond the end,
`step > m`, the learning rate is `min_lr`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step.

    Args:
        name: One of `SCHEDULES`.
        lr: Peak learning rate.
        max_steps: Number of optimizer steps in the whole run.
        warmup_steps: Number of steps that the linear rise takes.
        min_lr: Floor after the warm-up.
        power: Exponent of `PolynomialDecayAnnealing`; the others ignore it.

    Raises:
        ValueError: unknown name, or numbers that do not describe a schedule.
    """

    name: str
    lr: float
    max_steps: int
    warmup_steps: int = 0
    min_lr: float = 0.0
    power: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ValueError(
                f"schedule name={self.name!r} is unknown; use one of {', '.join(SCHEDULES)}"
            )
        if self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps} is not a positive number of steps")
        if not 0 <= self.warmup_steps <= self.max_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is not between 0 and the {self.max_steps} "
                "steps of the run; use fewer, or warmup_ratio"
            )
        if not 0.0 <= self.min_lr <= self.lr:
            raise ValueError(
                f"min_lr={self.min_lr} is not between 0 and the peak learning rate lr={self.lr}"
            )

    def learning_rate(self, step: int) -> float:
        """The learning rate of update number `step`, counted from 0."""
        if step <= self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        if self.name != "constant" and step > self.max_steps:
            return self.min_lr
        return SCHEDULES[self.name](self, step)


def _progress(s: Schedule, step: int) -> float:
    """Fraction of the steps after the warm-up that is over: (step - w) / (m - w)."""
    return (step - s.warmup_steps) / (s.max_steps - s.warmup_steps)


def warmup_annealing(s: Schedule, step: int) -> float:
    """Linear fall to zero: `max(lr * (m - step) / (m - w), min_lr)`."""
    return max(s.lr * (1.0 - _progress(s, step)), s.min_lr)


def cosine_annealing(s: Schedule, step: int) -> float:
    """Half a cosine: `min_lr + (lr - min_lr) * (1 + cos(pi * (step - w) / (m - w))) / 2`."""
    return s.min_lr + (s.lr - s.min_lr) * 0.5 * (1.0 + math.cos(math.pi * _progress(s, step)))


def square_root_annealing(s: Schedule, step: int) -> float:
    """Slow, then steep: `max(lr * sqrt((m - step) / m), min_lr)`.

    As in NeMo the fall is counted from step 0, so a warm-up ends with a drop of the learning rate
    by a factor of `sqrt(1 - w / m)`.
    """
    return max(s.lr * math.sqrt((s.max_steps - step) / s.max_steps), s.min_lr)


def polynomial_decay_annealing(s: Schedule, step: int) -> float:
    """`min_lr + (lr - min_lr) * (1 - (step - w) / (m - w)) ** power`."""
    return s.min_lr + (s.lr - s.min_lr) * (1.0 - _progress(s, step)) ** s.power


def inverse_square_root_annealing(s: Schedule, step: int) -> float:
    """`max(lr * sqrt((w + 1) / (step + 1)), min_lr)`: it does not know the end of the run."""
    return max(s.lr * math.sqrt((s.warmup_steps + 1) / (step + 1)), s.min_lr)


def constant(s: Schedule, step: int) -> float:
    """The peak learning rate, after the warm-up and beyond the end."""
    return s.lr


SCHEDULES: dict[str, Callable[[Schedule, int], float]] = {
    "WarmupAnnealing": warmup_annealing,
    "CosineAnnealing": cosine_annealing,
    "SquareRootAnnealing": square_root_annealing,
    "PolynomialDecayAnnealing": polynomial_decay_annealing,
    "InverseSquareRootAnnealing": inverse_square_root_annealing,
    "constant": constant,
}

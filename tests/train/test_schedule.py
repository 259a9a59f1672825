"""Schedules: every value is compared with numbers worked out by hand from the formulas."""

from __future__ import annotations

import math

import pytest

from tpcore.train.schedule import SCHEDULES, Schedule


def _rates(name: str, steps: list[int], **kwargs: float) -> list[float]:
    schedule = Schedule(name=name, lr=1.0, max_steps=10, **kwargs)  # type: ignore[arg-type]
    return [schedule.learning_rate(step) for step in steps]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_warmup_rises_linearly_to_the_peak(name: str) -> None:
    assert _rates(name, [0, 1, 2, 3], warmup_steps=3) == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_without_warmup_the_first_step_has_the_peak(name: str) -> None:
    assert _rates(name, [0]) == [1.0]


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        # steps 4, 7, 9, 10, 11 of 10, warm-up 2
        ("WarmupAnnealing", {}, [6 / 8, 3 / 8, 1 / 8, 0.0, 0.0]),
        ("WarmupAnnealing", {"min_lr": 0.25}, [6 / 8, 3 / 8, 0.25, 0.25, 0.25]),
        (
            "CosineAnnealing",
            {"min_lr": 0.2},
            [
                0.2 + 0.4 * (1 + math.sqrt(0.5)),
                0.2 + 0.4 * (1 + math.cos(0.625 * math.pi)),
                0.2 + 0.4 * (1 + math.cos(0.875 * math.pi)),
                0.2,
                0.2,
            ],
        ),
        ("SquareRootAnnealing", {}, [0.6**0.5, 0.3**0.5, 0.1**0.5, 0.0, 0.0]),
        ("PolynomialDecayAnnealing", {}, [6 / 8, 3 / 8, 1 / 8, 0.0, 0.0]),
        (
            "PolynomialDecayAnnealing",
            {"power": 2.0, "min_lr": 0.1},
            [0.1 + 0.9 * (6 / 8) ** 2, 0.1 + 0.9 * (3 / 8) ** 2, 0.1 + 0.9 / 64, 0.1, 0.1],
        ),
        (
            "InverseSquareRootAnnealing",
            {},
            [(3 / 5) ** 0.5, (3 / 8) ** 0.5, (3 / 10) ** 0.5, (3 / 11) ** 0.5, 0.0],
        ),
        ("constant", {}, [1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_after_the_warmup(
    name: str, kwargs: dict[str, float], expected: list[float]
) -> None:
    got = _rates(name, [4, 7, 9, 10, 11], warmup_steps=2, **kwargs)
    assert got == pytest.approx(expected, rel=1e-14, abs=1e-16)


def test_peak_scales_the_whole_curve() -> None:
    small = Schedule("CosineAnnealing", lr=3e-5, max_steps=50, warmup_steps=5)
    unit = Schedule("CosineAnnealing", lr=1.0, max_steps=50, warmup_steps=5)
    for step in range(55):
        assert small.learning_rate(step) == pytest.approx(3e-5 * unit.learning_rate(step))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "NoSuch"}, "NoSuch.*WarmupAnnealing"),
        ({"warmup_steps": 11}, "warmup_steps=11"),
        ({"min_lr": 2.0}, "min_lr=2.0"),
        ({"max_steps": 0}, "max_steps=0"),
    ],
)
def test_nonsense_is_refused(kwargs: dict[str, object], message: str) -> None:
    arguments = {"name": "CosineAnnealing", "lr": 1.0, "max_steps": 10, **kwargs}
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)  # type: ignore[arg-type]

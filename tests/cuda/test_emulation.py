"""The emulated device does what a device does, and ends the process where one would hang."""

from __future__ import annotations

import pytest

from tests.cuda.device import COMPILER, Device, SanitizerError


def test_the_emulation_and_the_wrappers(device):
    assert device.self_test() == ""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (0, "a barrier that some threads have left behind|in different places"),
        (1, "lanes of a warp meet in different operations"),
        (2, "names lanes that do not exist"),
        (3, "in different places"),
    ],
)
def test_misuse_ends_the_process(device, kind, message):
    with pytest.raises(SanitizerError, match=message):
        device.misuse(kind)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_a_race_is_seen_by_the_thread_sanitizer():
    device = Device("thread")
    try:
        assert device.self_test() == ""
        with pytest.raises(SanitizerError, match="data race"):
            device.misuse(4)
    finally:
        device.close()

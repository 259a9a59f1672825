"""One emulated device for all tests of this folder."""

from __future__ import annotations

import pytest

from tests.cuda.device import COMPILER, Device


@pytest.fixture(scope="session")
def device():
    """The kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""
    if COMPILER is None:
        pytest.skip("no C++ compiler: the CUDA kernels cannot be emulated")
    device = Device("address")
    yield device
    device.close()

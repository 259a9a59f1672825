"""The device that the tests run on: the CPU, or TPCORE_TEST_DEVICE (see tests/conftest.py)."""

from __future__ import annotations

import pytest
import torch

DEVICE = torch.get_default_device().type

# What is about the CPU's own ways, or would leave a GPU unusable for the tests that follow.
on_the_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="is about the CPU")

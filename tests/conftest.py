"""Fixtures that every test may use, and the device that the tests run on.

TPCORE_TEST_DEVICE=cuda makes that device torch's default one: tensors and modules that a test makes
without naming a device are there. What is about the CPU says `device="cpu"`.
"""

from __future__ import annotations

import os

import pytest
import torch

# Before the test modules are imported: they make tensors, too.
if os.environ.get("TPCORE_TEST_DEVICE"):
    torch.set_default_device(os.environ["TPCORE_TEST_DEVICE"])


@pytest.fixture(autouse=True)
def _seeded():
    """Each test draws the same numbers whichever tests run before it."""
    torch.manual_seed(1234)


@pytest.fixture(autouse=True)
def _own_environment():
    """What a test, or a library under it, sets in the environment ends with it.

    Lightning, for one, leaves LOCAL_RANK behind, and programs started later wait for other ranks.
    """
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)

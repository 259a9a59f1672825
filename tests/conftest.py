"""Fixtures that every test may use."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    """Each test draws the same numbers whichever tests run before it."""
    torch.manual_seed(1234)

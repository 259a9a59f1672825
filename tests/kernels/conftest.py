"""On which device the tests of the ops run: TPCORE_TEST_DEVICE, or the CPU."""

from __future__ import annotations

import os

import torch

# Before the test modules are imported: they make tensors, too.
if os.environ.get("TPCORE_TEST_DEVICE"):
    torch.set_default_device(os.environ["TPCORE_TEST_DEVICE"])

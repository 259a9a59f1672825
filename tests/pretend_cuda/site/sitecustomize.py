"""Makes torch.cuda of this process believe in the pretended device; Python imports this by itself.

As much of torch.cuda as tpcore, its tests and its benchmarks call. Times are those of the clock of
the host, sizes those of no device in particular.
"""

from __future__ import annotations

import resource
import time
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Event:
    def __init__(self, enable_timing: bool = False, **kwargs: object) -> None:
        self.seconds = 0.0

    def record(self, stream: object = None) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.seconds - self.seconds)


class _Stream:
    def __init__(self, *args: object, **kwargs: object) -> None:
        self.device = torch.device("cuda", 0)
        self.cuda_stream = 0

    def wait_stream(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class _Recorder(TorchDispatchMode):
    """Every op of torch and of ours that runs, with the tensors that it takes and gives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class _Graph:
    """A captured graph: the same ops again, on the same tensors."""

    def __init__(self) -> None:
        self.recorder = _Recorder()

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.recorder.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _peak_bytes(*args: object) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


_PROPERTIES = SimpleNamespace(
    name="pretended CUDA device",
    major=9,
    minor=0,
    total_memory=1 << 30,
    L2_cache_size=1 << 12,
    multi_processor_count=1,
)

for name, value in {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "init": lambda: None,
    "_lazy_init": lambda: None,
    "_lazy_call": lambda function, **kwargs: None,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "_exchange_device": lambda device: 0,
    "_maybe_exchange_device": lambda device: 0,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "get_device_name": lambda device=None: _PROPERTIES.name,
    "get_device_properties": lambda device=None: _PROPERTIES,
    "get_device_capability": lambda device=None: (9, 0),
    "is_bf16_supported": lambda including_emulation=True: True,
    "max_memory_allocated": _peak_bytes,
    "memory_allocated": _peak_bytes,
    "reset_peak_memory_stats": lambda device=None: None,
    "mem_get_info": lambda device=None: (1 << 30, 1 << 30),
    "Event": _Event,
    "CUDAGraph": _Graph,
    "graph": lambda graph: graph.recorder,
    "_sleep": lambda cycles: None,
    "Stream": _Stream,
    "stream": lambda stream: stream,
    "current_stream": _Stream,
    "default_stream": _Stream,
    "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8, device="cpu"),
    "set_rng_state": lambda state, device="cuda": None,
    "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8, device="cpu")],
    "set_rng_state_all": lambda states: None,
}.items():
    setattr(torch.cuda, name, value)

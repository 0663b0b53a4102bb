"""Counts what torch.distributed sends, by kind, whoever asks for it: pylo_dist, DTensor operations,
FSDP2, DDP.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

Counts = collections.Counter[str]
NAMESPACES = ("c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd")
SILENT = ("wait_tensor", "barrier", "monitored_barrier_")


class Collectives(TorchDispatchMode):
    """A context whose `counts` hold the operators of torch.distributed that were called in it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # what it does with its local tensors comes by as well
        if isinstance(func, torch._ops.OpOverload) and func.namespace in NAMESPACES:
            name = func._schema.name.split("::")[1]
            if name not in SILENT:
                self.counts[name] += 1
        return func(*args, **(kwargs or {}))

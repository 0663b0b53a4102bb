"""ZeRO over torch.distributed: `ZeroOptimizer`."""

from .inner import ELEMENTWISE
from .optimizer import ZeroOptimizer

__all__ = ["ELEMENTWISE", "ZeroOptimizer"]

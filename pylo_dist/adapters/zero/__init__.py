"""ZeRO over torch.distributed: `ZeroOptimizer`."""

from .optimizer import ZeroOptimizer

__all__ = ["ZeroOptimizer"]

"""The `torch.optim.Optimizer` that users see, and what it is made of."""

from .learned import LearnedOptimizer

__all__ = ["LearnedOptimizer"]

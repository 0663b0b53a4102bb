"""The `torch.optim.Optimizer` that users see, what it is made of, and the names it goes by."""

from .learned import LearnedOptimizer, StateDtype
from .registry import (
    Registration,
    load_plugin,
    register_optimizer,
    registered_optimizers,
)

__all__ = [
    "LearnedOptimizer",
    "Registration",
    "StateDtype",
    "load_plugin",
    "register_optimizer",
    "registered_optimizers",
]

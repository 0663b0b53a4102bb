"""What stands on a parameter in the place of a gradient that ZeRO-2 has freed, so that nobody takes
it for one that is not there. Holds one element of memory per parameter.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


class FreedGradient(Tensor):
    """A gradient that was averaged over the ranks and freed. It can be dropped, and knows its shape
    and dtype; every operation on its numbers is a ValueError.
    """

    @staticmethod
    def of(param: Tensor, dtype: torch.dtype) -> FreedGradient:
        """One that fits a parameter whose gradients have this dtype."""
        nothing = torch.zeros((), dtype=dtype, device=param.device).expand(param.shape)
        freed: FreedGradient = torch.Tensor._make_subclass(FreedGradient, nothing)
        return freed

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise ValueError(
            "ZeroOptimizer, stage 2, has averaged this gradient over the ranks and freed it: the "
            "averaged pieces are in optimizer.param_groups; clip with max_grad_norm= of a learned "
            "optimizer or pylo_dist.clip_grad_norm_(optimizer, max_norm), clear with "
            "optimizer.zero_grad(), or take stage=1, which keeps gradients on the parameters. If "
            "DistributedDataParallel reads it (a wrapper of yours, of accelerate's prepare, of "
            "Lightning's ddp): train the model without it, ZeroOptimizer averages by itself"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FreedGradient(shape={tuple(self.shape)}, dtype={self.dtype})"


def gradient_of(param: Tensor) -> Tensor | None:
    """The gradient on a parameter, if one is."""
    grad = param.grad
    return None if type(grad) is FreedGradient else grad


def make_room(param: Tensor, standing: set[int]) -> None:
    """Have what stands for a freed gradient go before another one is added to it.

    Args:
        standing: parameters on which something stands, by id; this one leaves it with that.
    """
    this = weakref.ref(param)

    def before_adding(_: Tensor) -> None:
        alive = this()
        if alive is not None and isinstance(alive.grad, FreedGradient):
            alive.grad = None
            standing.discard(id(alive))

    param.register_hook(before_adding)

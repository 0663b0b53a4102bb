"""Who else has a hand in the gradients that ZeroOptimizer sends: DDP, and what changes one after it
was sent. Reads only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ...core.devices import event_behind
from ...layouts.ddp import wrappers_of


def inside_ddp(model_or_params: Any) -> Any:
    """The module inside a DDP wrapper, or what was given."""
    if isinstance(model_or_params, DistributedDataParallel):
        return model_or_params.module
    return model_or_params


def changed_after_it_left(fqn: str, param: Tensor) -> ValueError:
    """The error for a gradient that is another one than what the other ranks got; names DDP where
    a wrapper of it holds the parameter (looks through all objects there are).
    """
    if wrappers_of([param]):
        return ValueError(
            f"DistributedDataParallel averages the gradient of {fqn!r} too, after ZeroOptimizer "
            "had sent it to the other ranks: train the model without DDP (ZeroOptimizer averages "
            "by itself), or give ZeroOptimizer the DDP module (stage=1), or build it with "
            f"overlap=False and stage=1{_lightnings_way()}"
        )
    return ValueError(
        f"the gradient of {fqn!r} was changed after backward had sent it to the other ranks (by "
        "clipping, clearing, or a collective of your own; ZeroOptimizer averages by itself); "
        "change the gradients in optimizer.param_groups instead, clip with "
        "pylo_dist.clip_grad_norm_, clear with optimizer.zero_grad(), or build ZeroOptimizer with "
        "overlap=False and stage=1"
    )


def _lightnings_way() -> str:
    """What to do where the wrapper is none of the user's own lines."""
    if "lightning.pytorch" not in sys.modules:
        return ""
    return (
        "; in Lightning: Trainer(strategy=pylo_dist.lightning.ZeroStrategy()), or "
        "ZeroOptimizer(self.trainer.strategy.model, ..., stage=1)"
    )


def maxima(grads: Sequence[Tensor]) -> list[Tensor]:
    """Of each gradient its maximum, 0-d; NaN where there is one. What changes all of a gradient
    changes this, and it is the same however many threads compute it.

    Args:
        grads: of one device, none of them empty; callers record no history.
    """
    return list(torch._foreach_max(list(grads))) if grads else []


class LateAnswer:
    """Of some things the first of which a flag on a device says that it is so. On a CPU the answer
    comes at once; elsewhere with the next question, so that no step waits for the device.
    """

    def __init__(self) -> None:
        self._asked: tuple[Sequence[Any], list[Tensor], list[torch.Event | None]] | None = None

    def ask(self, things: Sequence[Any], flags: Sequence[Tensor]) -> Any:
        """The first one known of, or None.

        Args:
            flags: bool (n,) tensors, together of all things in their order.
        """
        asked, self._asked = self._asked, None
        if asked is not None:
            for event in asked[2]:
                if event is not None:
                    event.synchronize()
            found = _first(asked[0], asked[1])
            if found is not None:
                return found
        if all(flag.device.type == "cpu" for flag in flags):
            return _first(things, flags)
        on_host = [
            torch.empty(flag.shape, dtype=torch.bool, pin_memory=True).copy_(
                flag, non_blocking=True
            )
            for flag in flags
        ]
        devices = {flag.device for flag in flags}
        self._asked = things, on_host, [event_behind(device) for device in devices]
        return None


def _first(things: Sequence[Any], flags: Sequence[Tensor]) -> Any:
    held = [found for flag in flags for found in flag.tolist()]
    return next((thing for thing, found in zip(things, held, strict=True) if found), None)

"""Who else has a hand in the gradients that ZeroOptimizer sends: DDP, and what changes one after it
was sent. Reads only.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .buckets import BucketParam


def inside_ddp(model_or_params: Any) -> Any:
    """The module inside a DDP wrapper, or what was given."""
    if isinstance(model_or_params, DistributedDataParallel):
        return model_or_params.module
    return model_or_params


def changed_after_it_left(fqn: str, param: Tensor) -> ValueError:
    """The error for a gradient that is another one than what the other ranks got; names DDP where
    a wrapper of it holds the parameter (looks through all objects there are).
    """
    if _is_in_ddp(param):
        return ValueError(
            f"DistributedDataParallel averages the gradient of {fqn!r} too, after ZeroOptimizer "
            "had sent it to the other ranks: train the model without DDP (ZeroOptimizer averages "
            "by itself), or give ZeroOptimizer the DDP module (stage=1), or build it with "
            "overlap=False and stage=1"
        )
    return ValueError(
        f"the gradient of {fqn!r} was changed after backward had sent it to the other ranks (by "
        "clipping, or a collective of your own; ZeroOptimizer averages by itself); change the "
        "gradients in optimizer.param_groups instead, clip with pylo_dist.clip_grad_norm_, or "
        "build ZeroOptimizer with overlap=False and stage=1"
    )


def _is_in_ddp(param: Tensor) -> bool:
    wrappers: list[nn.Module] = [
        found for found in gc.get_objects() if issubclass(type(found), DistributedDataParallel)
    ]
    return any(param is own for wrapper in wrappers for own in wrapper.parameters())


class LateAnswer:
    """Which members a flag on their device says are changed. On a CPU the answer comes at once;
    elsewhere with the next question, so that no step waits for the device.
    """

    def __init__(self) -> None:
        self._asked: tuple[list[BucketParam], list[Tensor], torch.cuda.Event] | None = None

    def ask(self, members: list[BucketParam], flags: Sequence[Tensor]) -> BucketParam | None:
        """The first changed member that is known of, or None.

        Args:
            flags: bool tensors, of all members in their order.
        """
        asked, self._asked = self._asked, None
        if asked is not None:
            asked[2].synchronize()
            found = _first(asked[0], asked[1])
            if found is not None:
                return found
        if all(flag.device.type == "cpu" for flag in flags):
            return _first(members, flags)
        on_host = [
            torch.empty(flag.shape, dtype=torch.bool, pin_memory=True).copy_(
                flag, non_blocking=True
            )
            for flag in flags
        ]
        event = torch.cuda.Event()
        event.record()
        self._asked = members, on_host, event
        return None


def _first(members: Sequence[BucketParam], flags: Sequence[Tensor]) -> BucketParam | None:
    changed = [found for flag in flags for found in flag.tolist()]
    return next((m for m, found in zip(members, changed, strict=True) if found), None)

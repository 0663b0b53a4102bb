"""What must not happen to a model once its parameters lie in buckets. Reads only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .buckets import Bucket, Named


class ModelWatch:
    """Looks, before every step, whether the model still is the one that was given to the optimizer.

    Args:
        model_or_params: as `ZeroOptimizer` got it; of a module also what is assigned later is
            noticed.
        buckets: those of its parameters; the list may grow.
        frozen: what was given too, and is in no bucket.
    """

    def __init__(
        self, model_or_params: Any, buckets: Sequence[Bucket], frozen: Sequence[Named]
    ) -> None:
        self._buckets = buckets
        self._frozen = list(frozen)
        self._registered: list[tuple[nn.Module, str, Tensor]] = []  # where a module keeps its own
        if isinstance(model_or_params, nn.Module):
            self._registered = [
                (module, name, param)
                for module in model_or_params.modules()
                for name, param in module._parameters.items()
                if param is not None
            ]

    def added(self, named: Sequence[Named], frozen: Sequence[Named]) -> None:
        """The first are optimized from now on, and may be trainable; the others came with them."""
        ids = {id(param) for _, param in [*named, *frozen]}
        self._frozen = [pair for pair in self._frozen if id(pair[1]) not in ids] + list(frozen)

    def problem(self) -> ValueError | None:
        """What happened that the next step cannot serve."""
        for bucket in self._buckets:
            begin, size = bucket.flat.data_ptr(), bucket.flat.element_size()
            for member in bucket.members:
                place = begin + member.offset * size
                if member.offset < member.end and member.param.data_ptr() != place:
                    return ValueError(
                        f"the memory of {member.fqn!r} was replaced after ZeroOptimizer was built "
                        "(by .to(), .half(), a new tensor); build the optimizer after such changes"
                    )
        for module, name, param in self._registered:
            if module._parameters.get(name) is not param:
                return ValueError(
                    f"{type(module).__name__}.{name} is another parameter than when ZeroOptimizer "
                    "was built (assigned, or by load_state_dict(assign=True)), which it would not "
                    "update; load in place, or build the optimizer after it"
                )
        for fqn, param in self._frozen:
            if param.requires_grad or param.grad is not None:
                return ValueError(
                    f"{fqn!r} was frozen when ZeroOptimizer was built, and is trainable or has a "
                    "gradient now, which is not averaged: add it on all ranks with "
                    "add_param_group, or build the optimizer while it is trainable and freeze it "
                    "after that"
                )
        return None

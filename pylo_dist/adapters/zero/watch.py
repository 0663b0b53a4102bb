"""What must not happen to a model once its parameters lie in buckets. Reads only."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from .buckets import Bucket


class ModelWatch:
    """Looks, before every step, whether the model still is the one that was given to the optimizer.

    Args:
        model_or_params: as `ZeroOptimizer` got it; of a module also what is assigned or unfrozen
            later is noticed.
        buckets: those of its parameters; the list may grow.
    """

    def __init__(self, model_or_params: Any, buckets: Sequence[Bucket]) -> None:
        self._buckets = buckets
        self._frozen: list[tuple[str, Tensor]] = []
        self._registered: list[tuple[nn.Module, str, Tensor]] = []  # where a module keeps its own
        if isinstance(model_or_params, nn.Module):
            named = model_or_params.named_parameters()
            self._frozen = [(fqn, param) for fqn, param in named if not param.requires_grad]
            self._registered = [
                (module, name, param)
                for module in model_or_params.modules()
                for name, param in module._parameters.items()
                if param is not None
            ]

    def added(self, params: Collection[Tensor]) -> None:
        """These are optimized from now on, and may be trainable."""
        ids = {id(param) for param in params}
        self._frozen = [(fqn, param) for fqn, param in self._frozen if id(param) not in ids]

    def problem(self) -> ValueError | None:
        """What happened that the next step cannot serve."""
        for bucket in self._buckets:
            for member in bucket.members:
                param, fqn = member.param, member.fqn
                if param.numel() and param.data_ptr() != bucket.flat[member.offset :].data_ptr():
                    return ValueError(
                        f"the memory of {fqn!r} was replaced after ZeroOptimizer was built (by "
                        ".to(), .half(), a new tensor); build the optimizer after such changes"
                    )
        for module, name, param in self._registered:
            if module._parameters.get(name) is not param:
                return ValueError(
                    f"{type(module).__name__}.{name} is another parameter than when ZeroOptimizer "
                    "was built (assigned, or by load_state_dict(assign=True)), which it would not "
                    "update; load in place, or build the optimizer after it"
                )
        for fqn, param in self._frozen:
            if param.requires_grad:
                return ValueError(
                    f"{fqn!r} was frozen when ZeroOptimizer was built and is trainable now; add it "
                    "on all ranks with add_param_group"
                )
        return None

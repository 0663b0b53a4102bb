"""The training loss, for rules that read it under frameworks that call `optimizer.step()` without
it: kept where a model computes it, given before the step. Writes no tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def keep_loss(
    model: nn.Module,
    optimizer: Any,
    *,
    loss_of: Callable[[Any], Tensor] | None = None,
    adds_up: bool | None = None,
    scale: float = 1.0,
) -> LossKeeper:
    """Give `optimizer` the losses of the forward passes of `model` before each of its steps.

    A step of several micro-batches is given the mean of their losses, or their sum where the parts
    add up to the loss of the step. What a framework multiplies the loss by before `backward()`
    (gradient accumulation, a loss scaler) does not matter: it is seen before.

    Args:
        model: whose forward pass returns the loss; passes in evaluation mode or without gradients
            are passed over. Under DDP or FSDP2 the module that computes the loss.
        optimizer: anything with `set_loss` and `register_step_pre_hook`: a learned optimizer, or
            a `ZeroOptimizer`, or what accelerate made of one.
        loss_of: finds the loss in what the model returns; None: its `loss`, a 0-d tensor itself,
            or the first 0-d tensor in a tuple.
        adds_up: whether the losses of the micro-batches of a step add up; None: where the forward
            pass was given `num_items_in_batch`, by which models of transformers divide.
        scale: what the loss is multiplied by.

    Returns:
        A handle, whose `remove()` ends it and whose `last` is what the last step was given.

    Example::

        pylo_dist.keep_loss(model, optimizer)
        for batch in data:
            framework.training_step(model, batch)  # calls optimizer.step() somewhere
    """
    return LossKeeper(model, optimizer, loss_of or _loss_of, adds_up, scale)


class LossKeeper:
    """See `keep_loss`.

    Attributes:
        last: the loss that the last step was given, 0-d; None before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        loss_of: Callable[[Any], Tensor],
        adds_up: bool | None,
        scale: float,
    ) -> None:
        self.last: Tensor | None = None
        self._loss_of, self._adds_up, self._scale = loss_of, adds_up, scale
        self._parts: list[Tensor] = []
        self._sums = False
        while not hasattr(optimizer, "set_loss") and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer  # accelerate's holds it
        self._set_loss = optimizer.set_loss
        self._handles = (
            model.register_forward_hook(self._keep, with_kwargs=True),
            optimizer.register_step_pre_hook(self._give),
        )

    def remove(self) -> None:
        """Leave model and optimizer alone from now on."""
        for handle in self._handles:
            handle.remove()
        self._parts.clear()

    def _keep(self, model: nn.Module, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        self._sums = (
            kwargs.get("num_items_in_batch") is not None if self._adds_up is None else self._adds_up
        )
        self._parts.append(self._loss_of(output).detach())

    def _give(self, *_: Any) -> None:
        """Before a step; one without a forward pass is left to whoever calls it."""
        parts, self._parts = self._parts, []
        if parts:
            together = torch.stack([part.reshape(()) for part in parts])
            loss = together.sum() if self._sums else together.mean()
            self.last = loss * self._scale
            self._set_loss(self.last)


def _loss_of(output: Any) -> Tensor:
    found = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", output)
    if isinstance(found, (tuple, list)):
        found = next((x for x in found if isinstance(x, Tensor) and x.dim() == 0), None)
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise ValueError(
            f"there is no loss in what the model returned ({type(output).__name__}): pass "
            "keep_loss(..., loss_of=lambda output: ...)"
        )
    return found

"""What DeepSpeed's backward passes leave for the step: which parameters have a gradient, and the
loss. Sets hooks on the parameters, and `engine.backward` of the engine it is given.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .layout import Layout


class BackwardRecord:
    """What has been heard since the last step.

    Attributes:
        present: full names of the parameters that have a gradient; DeepSpeed itself fills in zeros
            for those without.
    """

    def __init__(self) -> None:
        self.present: set[str] = set()
        self._seen_loss: Tensor | None = None
        self._given_loss: Tensor | float | None = None
        self._engine: Any = lambda: None
        self._layout = Layout("whole", None)
        self._at = 0

    def listen(self, engine: Any, layout: Layout, *, losses: bool) -> None:
        """Hear of this engine's backward passes from now on.

        Args:
            losses: keep the losses that `engine.backward` is given, too.
        """
        self._engine, self._layout = weakref.ref(engine), layout
        self._at = engine.global_steps
        for _, _, member in layout.members():
            if member.param.requires_grad:
                member.param.register_post_accumulate_grad_hook(self._noter(member.fqn))
        if losses:
            self._keep_losses(engine)

    def _noter(self, fqn: str) -> Callable[[Tensor], None]:
        """A hook that notes that a parameter has a gradient."""
        find = weakref.ref(self)  # the model may outlive the optimizer

        def note(_: Tensor) -> None:
            record = find()
            if record is not None:
                record.forget_skipped()
                record.present.add(fqn)

        return note

    def _keep_losses(self, engine: Any) -> None:
        """Wrap `engine.backward`, on this engine alone."""
        backward = engine.backward

        def keeping_the_loss(
            loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True, **kwargs: Any
        ) -> Any:
            result = backward(
                loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas, **kwargs
            )
            self.forget_skipped()
            part = loss.detach().to(torch.float64) / (
                engine.gradient_accumulation_steps() if scale_wrt_gas else 1
            )
            self._seen_loss = part if self._seen_loss is None else self._seen_loss + part
            return result

        engine.backward = keeping_the_loss

    @property
    def loss(self) -> Tensor | float | None:
        """This rank's loss of the coming step: the one given, else the mean of those seen."""
        return self._seen_loss if self._given_loss is None else self._given_loss

    def set_loss(self, loss: Tensor | float) -> None:
        """Give the loss of the coming step; those seen do not count."""
        self.forget_skipped()
        self._given_loss = loss.detach() if isinstance(loss, Tensor) else loss

    def forget_skipped(self) -> None:
        """Drop what belongs to a step that DeepSpeed skipped (inf, NaN): it counts it without
        calling its optimizer.
        """
        engine = self._engine()
        if engine is not None and engine.global_steps != self._at:
            self._at = engine.global_steps
            self.forget()

    def forget(self) -> None:
        """The step is over: drop all of it, and the gradients collected for it."""
        self.present.clear()
        self._seen_loss = self._given_loss = None
        self._layout.forget_gradients()

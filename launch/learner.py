"""What learns in a run: a model with its optimizer, on one rank or sharded over all. What a run
needs of it is `Trainable`, which ds.DeepSpeedLearner satisfies too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from model import GPT, build
from options import Options, WrongInput
from parallel import accumulation, spread, whole_model
from place import Place
from torch import Tensor, nn

Named = list[tuple[str, nn.Parameter]]


class Trainable(Protocol):
    """What a run needs of a model with its optimizer, wherever their numbers lie."""

    @property
    def optimizer(self) -> Any:
        """A torch.optim.Optimizer, whose groups' learning rates the loop sets."""

    @property
    def weights(self) -> Mapping[str, str] | None:
        """Name and hash of a learned optimizer's weights."""

    def loss(self, windows: np.ndarray) -> Tensor:
        """Mean loss of windows (n, tokens + 1)."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around loss and backward of a micro-batch; `last`: no other follows before `step`."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of a micro-batch's share of the loss of a step."""

    def step(self, loss: Tensor) -> None:
        """Update the parameters, given this rank's mean `loss`, 0-d, and clear the gradients.

        Raises FloatingPointError for gradients that are no numbers.
        """

    def states(self) -> dict[str, Any]:
        """What a checkpoint holds."""

    def num_parameters(self) -> int:
        """Elements of the model, each counted once."""

    def whole_model(self, options: Options) -> GPT:
        """The model on this rank with all its parameters; call it on all ranks."""


class Learner:
    """A model in PyTorch, or in one of the layouts of --parallel, and its optimizer."""

    def __init__(self, options: Options, place: Place) -> None:
        """Raises WrongInput for arguments or weights that the optimizer refuses."""
        sharded, learned = place.world_size > 1, options.chosen().entry
        self._learned = learned is not None
        package: Any = None
        if sharded or learned is not None:
            package = place.together(import_package)
        self._nonfinite: Any = package.NonFiniteGradientError if self._learned else ()
        self.weights: dict[str, str] | None = None
        optimizer_class: Any = torch.optim.AdamW
        arguments: dict[str, Any] = {"lr": options.base_lr(), "betas": (0.9, 0.95)}
        if learned is not None:
            optimizer_class = learned.face
            arguments = options.learned_arguments()
            # Tried on one number first: a rank that failed among the collectives of a sharded
            # optimizer would leave the others waiting. Rank 0 before the rest: they find in the
            # cache what it downloads.
            place.together(lambda: try_out(optimizer_class, arguments) if place.rank == 0 else None)
            self.weights = place.together(lambda: try_out(optimizer_class, arguments))
        self.model: GPT = build(options.config(), options.seed).to(place.device)
        if "width_mults" in arguments:
            arguments["width_mults"] = self.model.width_mults()

        def grouped(named: Named) -> Any:
            return named if self._learned else by_decay(named, options.decay())

        called: Any = self.model
        if sharded:
            called, self.optimizer = spread(
                self.model,
                optimizer_class,
                arguments,
                grouped,
                options,
                place.device,
                place.world_size,
            )
        else:
            self.optimizer = optimizer_class(
                grouped(list(self.model.named_parameters())), **arguments
            )
        # a learned optimizer clips by itself
        if options.max_grad_norm is not None and not self._learned:
            clip_before_step(
                getattr(self.optimizer, "inner", self.optimizer),
                package.clip_grad_norm_ if sharded else clip_all,
                options.max_grad_norm,
            )
        # After sharding, which moves the parameters.
        self._forward: Any = torch.compile(called) if options.compile else called
        self._autocast = options.dtype == "bfloat16"
        self._device = place.device
        self._grad_scale = options.grad_scale
        self._keeps_gradients_here = (
            accumulation(called, self.optimizer) if sharded else nullcontext
        )

    def loss(self, windows: np.ndarray) -> Tensor:
        """Mean loss of windows (n, tokens + 1)."""
        tokens = torch.from_numpy(windows).to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16) if self._autocast else nullcontext():
            loss: Tensor = self._forward(tokens[:, :-1], tokens[:, 1:])[1]
        return loss

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around loss and backward of a micro-batch; `last`: no other follows before `step`."""
        return nullcontext() if last else self._keeps_gradients_here()

    def backward(self, loss: Tensor) -> None:
        """Gradients of a micro-batch's share of the loss of a step."""
        if self._grad_scale != 1:
            loss = loss * self._grad_scale
        loss.backward()  # type: ignore[no-untyped-call]

    def states(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"model": self.model, "optimizer": self.optimizer}

    def num_parameters(self) -> int:
        return self.model.num_parameters()

    def whole_model(self, options: Options) -> GPT:
        """The model on this rank with all its parameters; call it on all ranks."""
        return whole_model(self.model, options, self._device)

    def step(self, loss: Tensor) -> None:
        """Update the parameters, given this rank's mean `loss`, 0-d, and clear the gradients.

        Raises FloatingPointError for gradients that are no numbers.
        """
        try:
            if self._learned:
                # velo reads it, and averages it over the ranks by itself
                self.optimizer.step(loss=loss)
            else:
                self.optimizer.step()
        except self._nonfinite as error:
            raise FloatingPointError(str(error)) from None
        self.optimizer.zero_grad()


def by_decay(named: Named, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of AdamW: decay pulls on matrices only, as is usual for GPT-2."""
    return [
        {"params": [(n, p) for n, p in named if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]


def clip_before_step(
    optimizer: torch.optim.Optimizer,
    clip: Callable[[torch.optim.Optimizer, float], Any],
    max_norm: float,
) -> None:
    """Let each step of `optimizer` (modified in place) begin with `clip`."""

    def before_step(*_: Any) -> None:  # what a hook returns would be the step's arguments
        clip(optimizer, max_norm)

    optimizer.register_step_pre_hook(before_step)


def clip_all(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Scale the gradients of `optimizer` (modified in place) to a global norm of at most
    `max_norm`.
    """
    torch.nn.utils.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], max_norm
    )


def import_package() -> Any:
    """pylo_dist, which plain AdamW on one rank does without. Raises WrongInput."""
    try:
        import pylo_dist
    except ImportError as error:
        raise WrongInput(
            f"pylo_dist cannot be imported ({error}); install it: pip install ."
        ) from None
    return pylo_dist


def try_out(optimizer_class: Any, arguments: dict[str, Any]) -> dict[str, str]:
    """Name and hash of the weights. Raises ValueError for arguments or weights that the optimizer
    refuses.
    """
    # the error says what its warnings do
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    weights = optimizer_class([torch.zeros(1, requires_grad=True)], **arguments).weights
    return {"name": weights.name, "hash": weights.digest}

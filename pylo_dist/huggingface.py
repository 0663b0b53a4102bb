"""Hugging Face's Trainer: a callback that brings the loss to rules that read it.

import pylo_dist.huggingface
transformers.Trainer(
    ...,
    optimizer_cls_and_kwargs=(pylo_dist.VeLO, {"num_steps": 20_000}),
    callbacks=[pylo_dist.huggingface.LossCallback()],
)
"""

from __future__ import annotations

from typing import Any

from .adapters.losses import LossKeeper, keep_loss

try:
    import transformers
except ImportError as error:
    raise ImportError(
        f"pylo_dist.huggingface needs transformers ({error}): pip install 'transformers>=5.0'"
    ) from error

__all__ = ["LossCallback"]


class LossCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Gives the Trainer's optimizer the loss of each step: the mean over its micro-batches.

    Where the model divides by the tokens of the whole accumulated batch, the parts add up; where
    those are counted over all ranks (`average_tokens_across_devices`), they are made this rank's.

    Attributes:
        keeper: see `keep_loss`; None before training.
    """

    def __init__(self) -> None:
        self.keeper: LossKeeper | None = None

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        inner = optimizer
        while not hasattr(inner, "set_loss"):  # under the wrappers of accelerate
            if not hasattr(inner, "optimizer"):
                raise ValueError(
                    f"the Trainer's optimizer is a {type(optimizer).__name__}, which reads no "
                    "loss: leave LossCallback out, or name a learned optimizer of pylo_dist in "
                    "optimizer_cls_and_kwargs"
                )
            inner = inner.optimizer
        scale = args.world_size if args.average_tokens_across_devices else 1
        self.keeper = keep_loss(model, inner, scale=float(scale))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.keeper is not None:
            self.keeper.remove()

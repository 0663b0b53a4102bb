"""Lightning: a strategy in which a ZeroOptimizer averages the gradients, and no DDP stands between.

    import pylo_dist.lightning

    class Model(lightning.LightningModule):
        def configure_optimizers(self):
            return pylo_dist.ZeroOptimizer(self, pylo_dist.AdafacLO, stage=2)

    lightning.Trainer(strategy=pylo_dist.lightning.ZeroStrategy(), ...).fit(Model(), data)

Other optimizers of the package need no strategy of ours: they work under Lightning's own.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.optim import Optimizer

from .adapters.zero import ZeroOptimizer
from .checkpoint.full_state import full_state_dict

try:
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from lightning.pytorch.strategies import DDPStrategy
except ImportError as error:
    raise ImportError(
        f"pylo_dist.lightning needs Lightning ({error}): pip install 'lightning>=2.6'"
    ) from error

__all__ = ["ZeroStrategy"]


class ZeroStrategy(DDPStrategy):  # type: ignore[misc]
    """`strategy="ddp"`, with ZeroOptimizers in the place of DistributedDataParallel.

    Ranks, samplers and logging are those of DDPStrategy, whose arguments it takes but for those of
    the wrapper. Micro-batches of `accumulate_grad_batches` stay on their rank until the last.
    Checkpoints hold the whole state of the optimizer and are read on any number of ranks, and by
    the same optimizer without ZeroOptimizer. Clip with `max_grad_norm=` of a learned optimizer or
    `pylo_dist.clip_grad_norm_`: the Trainer's gradient_clip_val sees one rank's part, and is
    refused.
    """

    def configure_ddp(self) -> None:
        """Leave the module as it is."""

    def setup_optimizers(self, trainer: Any) -> None:
        """Build what `configure_optimizers` gives.

        Raises:
            ValueError: another optimizer than a ZeroOptimizer; nobody would average its gradients.
        """
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if not isinstance(optimizer, ZeroOptimizer):
                raise ValueError(
                    f"configure_optimizers gave ZeroStrategy a {type(optimizer).__name__}, whose "
                    "gradients nobody would average: give it pylo_dist.ZeroOptimizer(self, "
                    'CLASS, ...), or take strategy="ddp"'
                )

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Around a micro-batch that is not the last: nothing is sent."""
        with ExitStack() as stack:
            for optimizer in self.optimizers:
                stack.enter_context(optimizer.no_sync())
            yield

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state dict on the first rank, {} on the others; all of them call it."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return full_state_dict(optimizer)

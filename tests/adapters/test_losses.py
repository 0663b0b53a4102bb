"""The loss of a step, for optimizers whose `step()` is called without it: the mean over its
micro-batches, whatever the framework scales it by.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylo_dist
from support.golden import velo_weights


class Model(nn.Module):
    def __init__(self, output: str = "loss") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.output = nn.Linear(4, 3), output

    def forward(self, x: Tensor, num_items_in_batch: int | None = None) -> Any:
        square = self.layer(x).square()
        loss = square.mean() if num_items_in_batch is None else square.sum() / num_items_in_batch
        outputs = {"loss": SimpleNamespace(loss=loss), "tensor": loss, "pair": (square, loss)}
        return outputs[self.output]


def batches(step: int) -> Tensor:
    """Of two micro-batches, (2, 6, 4)."""
    return torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(step))


def velo(model: nn.Module) -> Any:
    return pylo_dist.VeLO(model.named_parameters(), num_steps=9, weights=velo_weights("small"))


def zero(model: nn.Module) -> Any:
    return pylo_dist.ZeroOptimizer(
        model, pylo_dist.VeLO, num_steps=9, weights=velo_weights("small")
    )


def losses_of(model: Model, x: Tensor, items: int | None) -> list[Tensor]:
    found = []
    for part in x:
        output = model(part, num_items_in_batch=items)
        found.append(output[1] if model.output == "pair" else getattr(output, "loss", output))
    return found


@pytest.mark.parametrize("build", [velo, zero])
@pytest.mark.parametrize("items", [None, 2 * 6 * 3], ids=["means", "parts that add up"])
@pytest.mark.parametrize("output", ["loss", "tensor", "pair"])
def test_steps_are_those_that_were_given_the_loss(build: Any, items: Any, output: str) -> None:
    given, kept = Model(output), Model(output)
    first, second = build(given), build(kept)
    held = SimpleNamespace(optimizer=second)  # as accelerate's prepare does
    keeper = pylo_dist.keep_loss(kept, held if output == "pair" else second)
    for step in range(3):
        x = batches(step)
        parts = losses_of(given, x, items)
        loss = torch.stack(parts).sum() / (1 if items else 2)
        loss.backward()
        first.step(loss.detach())
        for part in losses_of(kept, x, items):
            # as frameworks scale it
            (part if items else part / 2).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            kept(x[0])  # a look in between does not count
        kept.eval()
        kept(x[1])
        kept.train()
        second.step()
        torch.testing.assert_close(keeper.last, loss.detach(), rtol=1e-6, atol=0)
        for optimizer in (first, second):
            optimizer.zero_grad()
    for a, b in zip(given.parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    keeper.remove()
    losses_of(kept, batches(3), items)[0].backward()
    with pytest.raises(ValueError, match="reads the training loss"):
        second.step()


def test_a_model_without_a_loss_is_told_so() -> None:
    model = nn.Linear(4, 3)
    keeper = pylo_dist.keep_loss(model, velo(model))
    with pytest.raises(ValueError, match=r"there is no loss in what the model returned \(Tensor\)"):
        model(torch.zeros(2, 4))
    keeper.remove()
    pylo_dist.keep_loss(model, velo(model), loss_of=lambda output: output.mean())
    model(torch.zeros(2, 4))

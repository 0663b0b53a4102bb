"""Gradients that arrive on several streams and threads of autograd, as with several devices.

Background: on one CPU autograd has one thread, and streams do not exist. Here the reducer's own
hooks are called from two threads, and streams are objects that write down who waits for whom.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import pylo_dist
from pylo_dist.adapters.zero import gathering, reduction
from support.optimizers import small_fc


class FakeStream:
    """Waits for others, and remembers for which."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.waited_for = device, list[Any]()

    def wait_stream(self, other: Any) -> None:
        self.waited_for.append(other)


CPU = torch.device("cpu")


@pytest.fixture
def reducer() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = pylo_dist.ZeroOptimizer(model, pylo_dist.AdafacLO, weights=small_fc(), stage=2)
    model.optimizer = [optimizer]  # kept as long as the model
    return model, optimizer._reducer


def test_two_threads_enter_one_after_the_other(
    reducer: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes while the first notes its gradient, and gets in when that one has left."""
    _, own = reducer
    noted: list[str] = []
    first = reduction._arrival_hook(weakref.ref(own), 0, 0)
    second = threading.Thread(
        target=reduction._arrival_hook(weakref.ref(own), 0, 1), args=(torch.ones(()),)
    )

    def arrive(b: int, i: int) -> None:
        noted.append(f"{i} in")
        if i == 0:
            second.start()
            second.join(0.2)  # as long as the first is inside; without a lock it ends at once
        noted.append(f"{i} out")

    monkeypatch.setattr(own, "_arrive", arrive)
    first(torch.ones(()))
    second.join()
    assert noted == ["0 in", "0 out", "1 in", "1 out"]


def test_a_bucket_follows_the_streams_of_its_gradients(
    reducer: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its copy is queued on the last one's stream, behind those of the others; their memory is
    kept until that has read it.
    """
    model, own = reducer
    streams = [FakeStream(CPU), FakeStream(CPU)]
    params = list(model.parameters())
    arrivals, kept = iter([0, 0, 0, 1]), list[Any]()
    now = streams[0]

    def record(grad: torch.Tensor, stream: Any) -> None:
        kept.append((grad.shape, stream))

    monkeypatch.setattr(reduction, "stream_of", lambda device: now)
    monkeypatch.setattr(torch.Tensor, "record_stream", record)
    arrive: Callable[[int, int], None] = own._arrive

    def on_its_stream(b: int, i: int) -> None:
        nonlocal now
        now = streams[next(arrivals)]
        arrive(b, i)

    monkeypatch.setattr(own, "_arrive", on_its_stream)
    model(torch.ones(2, 4)).sum().backward()
    assert streams[1].waited_for == [streams[0]]
    assert streams[0].waited_for == []
    assert len(kept) == len(params)
    assert {stream for _, stream in kept} == {streams[1]}
    model.optimizer[0].step()  # type: ignore[index]


def test_values_are_there_for_the_first_reader_and_for_the_stream_of_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home, here = FakeStream(CPU), FakeStream(CPU)
    param = nn.Parameter(torch.ones(3))
    monkeypatch.setattr(gathering, "stream_of", lambda device: here)
    waited: list[None] = []

    class Pending:
        def wait(self) -> None:
            waited.append(None)

    arrive = gathering._arrival(Pending(), [param], home)  # type: ignore[arg-type]
    param._pylo_dist_arrival = arrive  # type: ignore[attr-defined]
    param.__class__ = gathering.PendingParameter
    assert float(param.detach().sum()) == 3.0
    assert len(waited) == 1
    assert type(param) is nn.Parameter
    assert home.waited_for == [here]
    assert here.waited_for == []

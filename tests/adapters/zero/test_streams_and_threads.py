"""Gradients that arrive on several streams and threads of autograd, as with several devices.

Background: on one CPU autograd has one thread, and streams do not exist. Here the reducer's own
hooks are called from two threads, and streams are stand-ins that write down who waits for whom and
find memory that two of them could touch in either order (support/streams.py).
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import pylo_dist
from pylo_dist import comm
from pylo_dist.adapters.zero import gathering, reduction
from pylo_dist.adapters.zero.aside import Aside
from support.fake_ranks import world_of
from support.optimizers import small_fc
from support.streams import MODULES, Machine, Stream


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


class Branches(nn.Module):
    """Two chains of layers, which backward takes one after the other.

    Attributes:
        second: (machine, stream) on which the one is that backward takes first, if not on that of
            the other.
    """

    second: tuple[Machine, Stream] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(5)))
        self.right = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(5)))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        if self.second is not None:
            left.register_hook(self._on_compute)
            right.register_hook(self._on_second)
        return (left + right).square().sum()

    def _on_second(self, _: Tensor) -> None:
        assert self.second is not None
        machine, stream = self.second
        stream.wait_stream(machine.now)  # as autograd does where a gradient comes from another one
        machine.now = stream

    def _on_compute(self, _: Tensor) -> None:
        assert self.second is not None
        self.second[0].now = self.second[0].compute


@dataclass
class Trained:
    machine: Machine
    params: list[Tensor]
    begun: int = 0  # where the last backward pass begins in the log, and where it ends
    ended: int = 0

    def backward(self, stream: str) -> list[str]:
        """What was noted on a stream in the last backward pass."""
        log = self.machine.log[self.begun : self.ended]
        return [what for name, what in log if name.startswith(stream)]


def trained(
    stage: int,
    patch: pytest.MonkeyPatch,
    *,
    streams: bool = True,
    optimizers: int = 1,
    second: bool = False,
    overlap: bool = True,
    slices: bool = False,
    then: Callable[[Branches, Any], object] = lambda model, optimizer: None,
    **further: Any,
) -> Trained:
    """Three steps of one of two ranks; two layers are a bucket, those between branches too.

    Args:
        then: after each backward pass, with the first optimizer.
        further: of ZeroOptimizer.
    """
    torch.manual_seed(0)
    machine = Machine()
    machine.install(patch)
    if not streams:
        for module in MODULES:
            patch.setattr(module, "stream_of", lambda device: None)
    with machine:
        model = Branches()
        result = Trained(machine, [*model.parameters()])
        for param in result.params:
            param.register_post_accumulate_grad_hook(lambda p: machine.given_back(p.grad))
        parts = [model] if optimizers == 1 else [model.left, model.right]
        own = [
            pylo_dist.ZeroOptimizer(
                part,
                pylo_dist.AdafacLO,
                weights=small_fc(),
                stage=stage,
                overlap=overlap,
                **further,
                bucket_cap_mb=2 * 64 * 4 / 2**20,
                nonfinite="skip",  # nothing is received in the step: the sums hold anything
            )
            for part in parts
        ]
        for bucket in own[0].buckets if slices else ():
            cuts = [0, 16, 32, bucket.shard_numel]
            bucket.slices = [*itertools.pairwise(cuts)]
        if second:
            _share_streams(model, machine, patch)
        for _ in range(3):
            loss = model(torch.randn(4, 8))
            result.begun = len(machine.log)
            loss.backward()
            result.ended = len(machine.log)
            then(model, own[0])
            for optimizer in own:
                optimizer.step()
            if model.second is not None:  # before memory that was allocated there is used again
                model.second[1].wait_stream(machine.compute)
            for optimizer in own:
                optimizer.zero_grad()
        assert [len(o.buckets) for o in own] == ([5] if optimizers == 1 else [3, 3])
    return result


def _share_streams(model: Branches, machine: Machine, patch: pytest.MonkeyPatch) -> None:
    """One of the branches goes over a second stream."""
    second = Stream(machine, "second")
    model.second = machine, second
    end = reduction._end_of_pass

    def end_of_pass(reducer: Any) -> None:
        machine.now = machine.compute  # autograd's callbacks are on the stream of the caller ...
        machine.compute.wait_stream(second)  # ... which has waited for those of all gradients
        end(reducer)

    patch.setattr(reduction, "_end_of_pass", end_of_pass)


@pytest.fixture
def two_ranks() -> Iterator[None]:
    with world_of(2):
        yield


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("stage", [1, 2])
def test_the_stream_of_backward_waits_once_when_all_is_queued(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a bucket goes through is queued aside, two copies at a time; pass A is among it. No two
    streams touch the same memory without having waited, and the step is that without streams.
    """
    run = trained(stage, monkeypatch)
    assert run.machine.races == []
    assert run.backward("compute") == ["waits for aside 0"]
    assert run.machine.log[run.ended - 1] == ("compute", "waits for aside 0")
    queued = run.backward("aside 0")
    known = ("sends", "has", "pylo_dist.gradient_pass")
    assert [what.split(".default")[0] for what in queued if what.startswith(known)] == [
        *("sends 0", "sends 1"),
        *("has 0", "pylo_dist.gradient_pass", "sends 2"),
        *("has 1", "pylo_dist.gradient_pass", "sends 3"),
        *("has 2", "pylo_dist.gradient_pass", "sends 4"),
        *("has 3", "pylo_dist.gradient_pass", "has 4", "pylo_dist.gradient_pass"),
    ]
    copied = [i for i, what in enumerate(queued) if what.startswith("pylo_dist.copy_pass")]
    assert all(queued[i - 1] == "waits for compute" for i in copied)
    assert [queued[i + 1] for i in copied] == [f"sends {b}" for b in range(5)]
    with monkeypatch.context() as patch:
        plain = trained(stage, patch, streams=False)
    assert plain.backward("aside") == []
    assert all(map(torch.equal, run.params, plain.params))


@pytest.mark.usefixtures("two_ranks")
def test_the_host_waits_for_gradients_that_are_freed_and_for_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In ZeRO-2, before each bucket but the first two, until those two before it were copied."""
    with monkeypatch.context() as patch:
        assert trained(1, patch).machine.host == {}
    run = trained(2, monkeypatch)
    log = run.machine.log[run.begun : run.ended]
    places = [i for i, (stream, _) in enumerate(log) if stream == "host"]
    before = [[what for _, what in log[:i] if what.startswith("sends")][-1] for i in places]
    after = [next(what for _, what in log[i:] if what.startswith("sends")) for i in places]
    assert before == ["sends 1", "sends 2", "sends 3"]
    assert after == ["sends 2", "sends 3", "sends 4"]


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("stage", [1, 2])
def test_slices_are_queued_in_turn_and_the_host_waits_for_buckets(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a bucket it does not: its gradients stay until the last slice has been copied."""
    run = trained(stage, monkeypatch, slices=True)
    assert run.machine.races == []
    assert run.backward("compute") == ["waits for aside 0"]
    queued = [w for w in run.backward("aside 0") if w.startswith(("sends", "has"))]
    on_their_way = [0]
    for what in queued:
        on_their_way.append(on_their_way[-1] + (1 if what.startswith("sends") else -1))
    assert len(queued) == 2 * 3 * 5
    assert max(on_their_way) == 2
    log = run.machine.log[run.begun : run.ended]
    places = [i for i, (stream, _) in enumerate(log) if stream == "host"]
    after = [next(what for _, what in log[i:] if what.startswith("sends")) for i in places]
    assert after == (["sends 2", "sends 3", "sends 4"] if stage == 2 else [])
    with monkeypatch.context() as patch:
        plain = trained(stage, patch, streams=False)
    assert all(map(torch.equal, run.params, plain.params))


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("stage", [1, 2])
def test_of_two_reducers_each_has_a_stream_and_no_host_waits(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank may send in another order: here nobody waits for it in mid-backward."""
    run = trained(stage, monkeypatch, optimizers=2)
    assert run.machine.races == []
    assert run.machine.host == {}
    assert sorted(run.backward("compute")) == ["waits for aside 0", "waits for aside 1"]
    for stream in ("aside 0", "aside 1"):
        queued = [w for w in run.backward(stream) if w.startswith(("sends", "has"))]
        assert queued == ["sends 0", "sends 1", "sends 2", "has 0", "has 1", "has 2"]


def one_more_pass(model: Branches, _: Any) -> None:
    model(torch.ones(4, 8)).backward()


def look_and_scale(_: Branches, optimizer: Any) -> None:
    """As torch's GradScaler does, then clipping."""
    for group in optimizer.param_groups:
        for piece in group["params"]:
            piece.grad.mul_(0.5)
    pylo_dist.clip_grad_norm_(optimizer, 0.1)


def set_by_hand(model: Branches, optimizer: Any) -> None:
    optimizer.zero_grad()
    for param in model.parameters():
        param.grad = torch.full_like(param, 0.1)
    optimizer.reduce_gradients()


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("then", [one_more_pass, look_and_scale, set_by_hand])
@pytest.mark.parametrize("stage", [1, 2])
def test_whoever_comes_after_backward_sees_its_gradients(
    stage: int, then: Callable[[Branches, Any], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(stage, monkeypatch, then=then)
    assert run.machine.races == []
    with monkeypatch.context() as patch:
        plain = trained(stage, patch, then=then, streams=False)
    assert all(map(torch.equal, run.params, plain.params))


def test_whoever_calls_backward_waits_although_all_was_made_on_another_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine, own = Machine(), Aside(apart=True)
    machine.install(monkeypatch)
    machine.now = Stream(machine, "second")
    with own.behind(torch.device("cpu")):
        pass
    machine.now = machine.compute
    own.join()
    assert machine.log[0] == ("aside 0", "waits for second")
    joined = [("compute", "waits for aside 0"), ("second", "waits for aside 0")]
    assert sorted(machine.log[1:]) == joined


def test_sums_over_replicas_are_waited_for_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    with world_of(4):
        groups = [dist.new_group(ranks) for ranks in ([0, 1], [0, 2])]
        # the other ranks, who are not there, do not say where they are
        monkeypatch.setattr(comm, "union", lambda *_: dist.group.WORLD)
        run = trained(2, monkeypatch, process_group=groups[0], replicate_group=groups[1])
    assert run.machine.races == []
    assert run.backward("compute") == ["waits for aside 0"]
    queued = [w for w in run.backward("aside 0") if w.startswith(("sends", "has", "adds"))]
    assert queued[:6] == ["sends 0", "sends 1", "has 0", "adds", "has added", "sends 2"]


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("stage", [1, 2])
def test_a_bucket_follows_the_streams_of_its_gradients(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(stage, monkeypatch, second=True)
    assert run.machine.races == []
    assert run.backward("compute") == ["waits for second", "waits for aside 0"]
    assert run.backward("second") == ["waits for compute", "waits for aside 0"]
    queued = run.backward("aside 0")
    mixed = queued[queued.index("has 0") : queued.index("sends 2") - 1]  # the last is its copy
    assert sorted(mixed[-2:]) == ["waits for compute", "waits for second"]


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("stage", [1, 2])
def test_without_overlap_all_is_queued_where_the_step_is(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(stage, monkeypatch, second=True, overlap=False)
    assert run.machine.races == []
    assert {name for name, _ in run.machine.log} == {"compute", "second", "network"}
    assert {*run.machine.kept.values()} == {("compute",)}  # whose memory is that of the second


def nothing(*_: Any, **__: Any) -> None:
    """In the place of what waits."""


BEHIND, LET_GO = Aside.behind, Aside.let_go


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize(
    ("part", "name", "less", "found"),
    [
        (Aside, "join", nothing, "on compute beside"),
        (Stream, "wait_stream", nothing, "on aside 0 beside"),
        (Aside, "behind", lambda self, device, *_: BEHIND(self, device), "on aside 0 beside"),
        (Aside, "behind", lambda self, device, on=(), _=(): BEHIND(self, device, on), "given back"),
        (Aside, "let_go", lambda self, most=None: self._held.clear(), "given back"),
    ],
)
def test_what_is_left_out_is_found(
    part: Any, name: str, less: Any, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what the tests above say that it is done."""
    monkeypatch.setattr(part, name, less)
    races = trained(2, monkeypatch, second=True).machine.races
    assert [race for race in races if found in race]


def test_values_are_there_for_the_first_reader_and_for_the_stream_of_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine()
    home, here = Stream(machine, "home"), Stream(machine, "here")
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
    assert machine.log == [("home", "waits for here")]

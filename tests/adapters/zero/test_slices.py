"""Buckets that travel in slices: nothing large is on its way, and no number differs.

Background: a large embedding makes a large bucket. Its gradients, and over gloo its parameters,
leave a part of every rank's part at a time. Which slices there are changes no sum: over gloo the
ranks' numbers are added in rank order wherever they lie.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pylo_dist
from pylo_dist.adapters.zero import buckets
from pylo_dist.core import trace
from support.fake_ranks import world_of
from support.optimizer_cases import snapshot
from support.optimizers import small_fc
from support.ranks import run_ranks

VOCABULARY, WIDTH, TOKENS = 400, 16, 12
CAP_MB = 0.004  # of 26 kB of embedding: six slices


class Words(nn.Module):
    """A large embedding and small layers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, WIDTH, dtype=dtype)
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, 80, dtype=dtype), nn.Tanh(), nn.Linear(80, 3, dtype=dtype)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.table(tokens)).square().mean()


class Sent(TorchDispatchMode):
    """The largest tensor, in bytes, that each kind of collective was given in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            for buffers in args[:2]:
                sizes = [
                    t.nbytes for t in torch.utils._pytree.tree_leaves(buffers) if _is_tensor(t)
                ]
                self.largest[name] = max(self.largest.get(name, 0), sum(sizes))
        return func(*args, **(kwargs or {}))


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


GATHERS = ("allgather_", "_allgather_base_")


def whole(optimizer: Any) -> None:
    """Have every bucket leave in one piece, as if it were small."""
    for bucket in optimizer.buckets:
        bucket.slices = [(0, bucket.shard_numel)]


def trained(rank: int, in_slices: bool, case: dict[str, Any]) -> dict[str, Any]:
    settings = dict(case)
    dtype = settings.pop("dtype", torch.float32)
    model, cap_mb = Words(dtype), CAP_MB * dtype.itemsize / 4
    passes, poisoned = settings.pop("passes", 1), settings.pop("poisoned", None)
    learned = {"weights": small_fc(), "nonfinite": "skip"}
    optimizer = pylo_dist.ZeroOptimizer(
        model, pylo_dist.AdafacLO, bucket_cap_mb=cap_mb, **learned, **settings
    )
    slices = [len(bucket.slices) for bucket in optimizer.buckets]
    if not in_slices:
        whole(optimizer)
    found, sent = [], Sent()
    generator = torch.Generator().manual_seed(rank)
    for step in range(3):
        with sent:
            for _ in range(passes):
                tokens = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
                model(tokens).backward()
            if poisoned is not None and step == 1 and rank == 1:
                table = model.table.weight
                assert table.grad is not None
                table.grad.view(-1)[poisoned] = torch.inf
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            found += [torch.zeros(0) if grad is None else grad.clone() for grad in grads]
            optimizer.step()
            found += snapshot(model).values()
        optimizer.zero_grad()
    return {"found": found, "slices": slices, "largest": sent.largest}


CASES: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1},
    "stage 1, no overlap, inf at last": {"stage": 1, "overlap": False, "poisoned": -1},
    "stage 1, no overlap, inf at first": {"stage": 1, "overlap": False, "poisoned": 0},
    "stage 2, three passes": {"stage": 2, "passes": 3},
    "stage 2, bfloat16": {"stage": 2, "dtype": torch.bfloat16},
    "stage 2, sums in bfloat16": {"stage": 2, "reduce_dtype": torch.bfloat16},
}


def with_masters(cap_mb: float | None, seed: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = Words(torch.bfloat16)
    return model, pylo_dist.ZeroOptimizer(
        model, pylo_dist.AdafacLO, weights=small_fc(), bucket_cap_mb=cap_mb
    )


def saved_and_loaded(rank: int) -> dict[str, Any]:
    """The whole state of an optimizer in many buckets, and of one in other buckets that has loaded
    it; what is left of a table that was overwritten after that, behind a step without gradients.
    """
    (model, saver), (other, loader) = with_masters(CAP_MB / 8, seed=0), with_masters(CAP_MB, seed=1)
    for optimizer, of, steps in ((saver, model, 2), (loader, other, 1)):
        for step in range(steps):
            of(torch.arange(rank + step, 400, 3)).backward()
            optimizer.step()
            optimizer.zero_grad()
    saved = pylo_dist.full_state_dict(saver, rank0_only=False)
    other.load_state_dict(model.state_dict())
    loader.load_state_dict(saved)
    loaded = pylo_dist.full_state_dict(loader, rank0_only=False)
    other.table.weight.data.fill_(0.5)
    loader.step()
    return {
        "overwritten": other.table.weight.detach().clone(),
        "slices": len(loader.buckets[0].slices),
        "buckets": [len(saver.buckets), len(loader.buckets)],
        "states": [saved, loaded],
    }


def ranks_in_slices(rank: int, world: int) -> dict[str, Any]:
    buckets.SMALLEST_SLICE_MB = 0.0  # in this process
    found: dict[str, Any] = {
        name: [trained(rank, in_slices, case) for in_slices in (True, False)]
        for name, case in CASES.items()
    }
    return {"trained": found, "loaded": saved_and_loaded(rank)}


@pytest.fixture(scope="module")
def outcome() -> list[dict[str, Any]]:
    return run_ranks(3, ranks_in_slices)


def test_slices_change_no_bit_and_nothing_large_is_sent(outcome: list[dict[str, Any]]) -> None:
    table = VOCABULARY * WIDTH
    for result in outcome:
        for name, (parts, one) in result["trained"].items():
            assert max(parts["slices"]) >= 6, name
            assert min(parts["slices"]) == 1, name
            for got, wanted in zip(parts["found"], one["found"], strict=True):
                assert torch.equal(got, wanted) or bool(got.isnan().any()), name
                assert torch.equal(got.isnan(), wanted.isnan()), name
            # sums are in float32 but where they are asked for in bfloat16
            size = 2 if name.endswith("sums in bfloat16") else 4
            assert one["largest"]["alltoall_base_"] > size * table, name
            flags = 3 * size * buckets.ALIGNMENT
            assert parts["largest"]["alltoall_base_"] < 2 * CAP_MB * 2**20 + flags, name
            # parameters too, of which gloo makes a copy to send them
            assert one["largest"]["_allgather_base_"] > 2 * table, name
            assert max(parts["largest"][kind] for kind in GATHERS) < 2 * CAP_MB * 2**20, name


def test_states_go_from_some_buckets_to_others(outcome: list[dict[str, Any]]) -> None:
    for result in outcome:
        many, one = result["loaded"]["buckets"]
        assert many > one == 1
        assert result["loaded"]["slices"] > 1
        assert bool((result["loaded"]["overwritten"] == 0.5).all())
        saved, loaded = result["loaded"]["states"]
        assert saved["state"].keys() == loaded["state"].keys()
        for i, entries in saved["state"].items():
            assert "master" in entries
            for name, tensor in entries.items():
                assert torch.equal(loaded["state"][i][name], tensor), (i, name)


def test_buckets_grow_with_the_ranks_up_to_a_share_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = [buckets.default_cap_mb(6400.0, ranks) for ranks in (1, 8, 50, 64, 256, 512, 4096)]
    assert sizes == [25, 25, 25, 32, 128, 200, 200]
    assert buckets.default_cap_mb(500.0, 4096) == 25
    # 128 tensors of 1 kB: 4 of them are 1/32
    monkeypatch.setattr(buckets, "SMALLEST_CAP_MB", 1 / 2**10)
    monkeypatch.setattr(buckets, "MESSAGE_MB", 1 / 2**13)
    found = {}
    for ranks, asked in ((4, None), (16, None), (1024, None), (1024, 2 / 2**10)):
        params = [nn.Parameter(torch.zeros(256)) for _ in range(128)]
        with world_of(ranks):
            optimizer = pylo_dist.ZeroOptimizer(params, torch.optim.SGD, bucket_cap_mb=asked)
            found[ranks, asked] = len(optimizer.buckets)
            report = str(optimizer.report())
        assert f"{len(optimizer.buckets)} buckets, closed at 0.00" in report
    assert [*found.values()] == [128, 64, 32, 64]


class Packed:
    """An observer of `trace`: copies of what leaves, (2, ...) each."""

    def __init__(self) -> None:
        self.copies: list[Tensor] = []

    def begin(self, name: str, buffer: Tensor | None) -> None:
        if name == "collective: reduce_scatter" and buffer is not None:
            self.copies.append(buffer.clone().view(2, -1))

    def end(self, name: str) -> None:
        pass


@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_that_comes_while_a_bucket_leaves_is_not_mixed_in(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the slices have left when the parameter gets a gradient of another pass: under stage
    2 that leaves in a round of its own; under stage 1, where gradients add up on the parameter, the
    sum of both does.
    """
    monkeypatch.setattr(buckets, "SMALLEST_SLICE_MB", 0.0)
    with world_of(2):
        param, packed = nn.Parameter(torch.zeros(256)), Packed()
        optimizer = pylo_dist.ZeroOptimizer(
            [param], torch.optim.SGD, lr=1.0, stage=stage, bucket_cap_mb=256 / 2**20
        )
        own, first, second = optimizer._reducer, torch.arange(256.0), torch.full((256,), 1000.0)
        assert len(optimizer.buckets[0].slices) == 4
        with trace.observe(packed), optimizer.no_sync():
            (param * first).sum().backward()
            own._launch_next()
            own._launch_next()
            (param * second).sum().backward()
            own._close_round()
            own._go_to(0)
            own._close_round()
    slices = [copy[:, : -buckets.ALIGNMENT] for copy in packed.copies]
    assert [part.shape for part in slices] == [(2, 32)] * 8
    rounds = [torch.cat(slices[i : i + 4], 1).flatten() for i in (0, 4)]
    if stage == 2:
        assert torch.equal(rounds[0], first)
        assert torch.equal(rounds[1], second)
    else:
        assert torch.equal(rounds[1], first + second)

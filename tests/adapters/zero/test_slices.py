"""Buckets that travel in slices: nothing large is on its way, and no number differs.

Background: a large embedding makes a large bucket. Its gradients, and over gloo its parameters,
leave a part of every rank's part at a time. Which slices there are changes no sum: over gloo the
ranks' numbers are added in rank order wherever they lie.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pylo_dist
from pylo_dist.adapters.zero import buckets
from pylo_dist.core import trace
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
    passes, poisoned = settings.pop("passes", 1), settings.pop("poisoned", False)
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
            if poisoned and step == 1 and rank == 1:  # the last element of the table
                table = model.table.weight
                assert table.grad is not None
                table.grad[-1, -1] = torch.inf
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            found += [torch.zeros(0) if grad is None else grad.clone() for grad in grads]
            optimizer.step()
            found += snapshot(model).values()
        optimizer.zero_grad()
    return {"found": found, "slices": slices, "largest": sent.largest}


CASES: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1},
    "stage 1, no overlap, inf": {"stage": 1, "overlap": False, "poisoned": True},
    "stage 2, three passes": {"stage": 2, "passes": 3},
    "stage 2, bfloat16": {"stage": 2, "dtype": torch.bfloat16},
    "stage 2, sums in bfloat16": {"stage": 2, "reduce_dtype": torch.bfloat16},
}


def ranks_in_slices(rank: int, world: int) -> dict[str, Any]:
    buckets.SMALLEST_SLICE_MB = 0.0  # in this process
    return {
        name: [trained(rank, in_slices, case) for in_slices in (True, False)]
        for name, case in CASES.items()
    }


def test_slices_change_no_bit_and_nothing_large_is_sent() -> None:
    table = VOCABULARY * WIDTH
    for per_case in run_ranks(3, ranks_in_slices):
        for name, (parts, one) in per_case.items():
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
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  (the backend "fake")

    monkeypatch.setattr(buckets, "SMALLEST_SLICE_MB", 0.0)
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    try:
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
    finally:
        dist.destroy_process_group()
    slices = [copy[:, : -buckets.ALIGNMENT] for copy in packed.copies]
    assert [part.shape for part in slices] == [(2, 32)] * 8
    rounds = [torch.cat(slices[i : i + 4], 1).flatten() for i in (0, 4)]
    if stage == 2:
        assert torch.equal(rounds[0], first)
        assert torch.equal(rounds[1], second)
    else:
        assert torch.equal(rounds[1], first + second)

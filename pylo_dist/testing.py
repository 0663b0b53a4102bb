"""Virtual ranks: run any learned optimizer on arbitrarily cut tensors in one process, and compare
layouts.

Because rules know no mesh, each virtual rank is an ordinary optimizer over its own pieces; this
module advances them in lock step and adds by hand what a process group would add.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Union

import torch
from torch import Tensor

from .comm import Collective
from .core.pieces import bind_shard
from .core.requests import Transfer
from .core.shards import TensorShard
from .optimizer import LearnedOptimizer

Cut = Union[int, Sequence[int], Sequence[TensorShard]]


@dataclass
class VirtualGroup:
    """Stands in for a process group whose ranks are run by `run_virtual`."""

    ranks: int

    def size(self) -> int:
        return self.ranks


@dataclass
class VirtualRun:
    """What a virtual run ends with, put together again.

    Attributes:
        params: global parameters by fqn; state: global state by fqn and name, canonical shapes.
        history: the global parameters after every step.
        optimizers: one per virtual rank.
        reductions, exchanges: number of reductions and of all-to-all exchanges of each step.
    """

    params: dict[str, Tensor]
    state: dict[str, dict[str, Tensor]]
    history: list[dict[str, Tensor]]
    optimizers: list[LearnedOptimizer]
    reductions: list[int] = field(default_factory=list)
    exchanges: list[int] = field(default_factory=list)


def run_virtual(
    optimizer_class: type[LearnedOptimizer],
    params: Mapping[str, Tensor],
    cuts: int | Mapping[str, Cut],
    grads: Sequence[Mapping[str, Tensor | None]],
    *,
    losses: Sequence[float | Tensor] | None = None,
    **kwargs: object,
) -> VirtualRun:
    """Run `len(grads)` steps of an optimizer with every tensor cut over virtual ranks.

    Args:
        params: initial global tensors by fqn (not modified).
        cuts: number of ranks (even flat intervals); or per fqn that number, the flat cut points
            between the ranks (repeated points make empty shards), or one `TensorShard` per rank.
            All must name the same number of ranks.
        grads: per step the global gradients, already averaged; None or a missing fqn: no rank has
            one.
        losses: per step the training loss, for rules that read it.
        **kwargs: for `optimizer_class`.

    Raises:
        ValueError: cuts that do not tile a tensor exactly once.
        AssertionError: ranks that ask for different reductions (a hang on real ranks), or
            replicated state whose bits differ.
    """
    shards = {
        fqn: _shards(fqn, tuple(p.shape), cuts if isinstance(cuts, int) else cuts[fqn])
        for fqn, p in params.items()
    }
    counts = {fqn: len(pieces) for fqn, pieces in shards.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"all tensors must be cut over the same number of ranks, got {counts}")
    group = VirtualGroup(next(iter(counts.values())))
    locals_: list[dict[str, torch.nn.Parameter]] = []
    for rank in range(group.ranks):
        pieces = {}
        for fqn, p in params.items():
            pieces[fqn] = torch.nn.Parameter(
                p.detach().reshape(-1)[shards[fqn][rank].indices().to(p.device)]
            )
            bind_shard(pieces[fqn], shards[fqn], rank, group)
        locals_.append(pieces)
    face: Callable[..., LearnedOptimizer] = optimizer_class
    optimizers = [face(list(pieces.items()), **kwargs) for pieces in locals_]
    run = VirtualRun({}, {}, [], optimizers)
    for t, step_grads in enumerate(grads):
        for optimizer in run.optimizers:
            if losses is not None:
                optimizer.set_loss(losses[t])
        for rank, pieces in enumerate(locals_):
            for fqn, piece in pieces.items():
                grad = step_grads.get(fqn)
                index = shards[fqn][rank].indices().to(piece.device)
                piece.grad = None if grad is None else grad.detach().reshape(-1)[index].clone()
        reductions, exchanges = _step([optimizer.phases() for optimizer in run.optimizers])
        run.reductions.append(reductions)
        run.exchanges.append(exchanges)
        run.history.append(
            {
                fqn: _join([pieces[fqn].detach() for pieces in locals_], shards[fqn], (), p.shape)
                for fqn, p in params.items()
            }
        )
    run.params = run.history[-1] if run.history else {fqn: p.clone() for fqn, p in params.items()}
    for fqn, p in params.items():
        run.state[fqn] = {}
        if not p.numel():  # takes part in no step
            continue
        fields = run.optimizers[0].state_fields(locals_[0][fqn])
        states = [
            optimizer.state[pieces[fqn]]
            for optimizer, pieces in zip(run.optimizers, locals_, strict=True)
        ]
        for name, f in fields.items():
            copies = [state[name] for state in states]
            if f.replicated is None:
                run.state[fqn][name] = _join(
                    [f.flat(c) for c in copies], shards[fqn], f.copies, p.shape
                )
                continue
            kept = [c for c, s in zip(copies, shards[fqn], strict=True) if f.is_kept(s)]
            assert all(torch.equal(c, kept[0]) for c in kept), (
                f"{name} of {fqn} differs between ranks"
            )
            run.state[fqn][name] = kept[0].clone()
    return run


def _shards(fqn: str, shape: tuple[int, ...], cut: Cut) -> list[TensorShard]:
    total = math.prod(shape)
    if isinstance(cut, int):
        size = -(-total // cut)
        cut = [min(total, size * rank) for rank in range(1, cut)]
    points = [c for c in cut if isinstance(c, int)]
    if len(points) == len(cut):
        bounds = [0, *points, total]
        if bounds != sorted(bounds):
            raise ValueError(f"{fqn!r}: cut points {points} must rise within 0 .. {total}")
        pieces = [TensorShard.interval(fqn, shape, a, b) for a, b in pairwise(bounds)]
    else:
        pieces = [c for c in cut if isinstance(c, TensorShard)]
    covered = torch.zeros(total, dtype=torch.int64)
    for piece in pieces:
        covered[piece.indices()] += 1
    if not bool((covered == 1).all()):
        raise ValueError(f"{fqn!r}: the shards must hold each of the {total} elements exactly once")
    return pieces


def _step(ranks: Sequence[Iterator[list[Collective]]]) -> tuple[int, int]:
    """Serve one step of all ranks in lock step; returns how many reductions and exchanges it
    took.
    """
    reductions = exchanges = 0
    while True:
        requests = [next(rank, None) for rank in ranks]
        if all(request is None for request in requests):
            return reductions, exchanges
        asked = [
            None if request is None else [_signature(c) for c in request] for request in requests
        ]
        assert all(a == asked[0] for a in asked), (
            f"the ranks ask for different collectives, which would hang: {asked}"
        )
        for collectives in zip(
            *(request for request in requests if request is not None), strict=True
        ):
            transfers = [c for c in collectives if isinstance(c, Transfer)]
            buffers = [c[1] for c in collectives if not isinstance(c, Transfer)]
            if buffers:
                reductions += 1
                total = torch.stack(buffers).sum(0)
                for buffer in buffers:
                    buffer.copy_(total)
            if transfers:
                exchanges += 1
                sent = [transfer.send.split(transfer.send_counts) for transfer in transfers]
                for rank, transfer in enumerate(transfers):
                    transfer.receive.copy_(torch.cat([parts[rank] for parts in sent]))


def _signature(collective: Collective) -> object:
    return "exchange" if isinstance(collective, Transfer) else tuple(collective[1].shape)


def _join(
    pieces: Sequence[Tensor],
    shards: Sequence[TensorShard],
    copies: tuple[int, ...],
    shape: torch.Size,
) -> Tensor:
    """Local (*copies, N) pieces as one (*copies, *shape) tensor."""
    whole = pieces[0].new_empty((*copies, math.prod(shape)))
    for piece, shard in zip(pieces, shards, strict=True):
        whole[..., shard.indices().to(whole.device)] = piece.reshape(*copies, shard.numel)
    return whole.view((*copies, *shape))


def layout_error(
    got: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    largest_change: Mapping[str, Tensor],
    share: float | None = None,
) -> dict[str, float]:
    """How far two layouts are apart, per tensor, in units of the layout tolerance (1 is the limit).

    The tolerance: no element differs by more than 4 units in its last place or 1e-5 (float32; 1e-12
    in float64) of the tensor's largest one-step change, whichever is larger. Elementwise arithmetic
    is the same in every layout; what differs is the order of the float64 sums and the rounding of
    matrix products over few rows.

    Args:
        largest_change: per tensor, the largest absolute change of an element in one step, 0-d.
        share: of the largest change, instead of 1e-5 or 1e-12. Newton-Schulz amplifies the last
            bits of its input: 5e-5.
    """
    errors = {}
    for fqn, tensor in wanted.items():
        if not tensor.numel():
            continue
        of_change = share or (1e-12 if tensor.dtype == torch.float64 else 1e-5)
        ulp = torch.nextafter(tensor.abs(), torch.full_like(tensor, math.inf)) - tensor.abs()
        limit = torch.maximum(4.0 * ulp, of_change * largest_change[fqn].to(tensor.dtype))
        error = ((got[fqn] - tensor).abs() / limit).max()
        # NaN would pass any comparison
        errors[fqn] = float(error) if bool(error.isfinite()) else math.inf
    return errors


def largest_changes(history: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The largest absolute change of an element between two entries of a history, per tensor."""
    return {
        fqn: torch.stack(
            [
                (b[fqn] - a[fqn]).abs().max() if a[fqn].numel() else a[fqn].sum()
                for a, b in pairwise(history)
            ]
        ).max()
        for fqn in history[0]
    }

"""A model of step time and bytes on many ranks; measures nothing. scaling.py checks it and predicts
with it.

With T tokens per rank, N parameters in buckets of n bytes each, R ranks, and per collective a
latency and a bandwidth:

    compute      T x seconds per token                                            measured on one
                 device
    optimizer    N / R x seconds per parameter (replicated: N x)                  measured on one
                 device
    exchange     per bucket (R - 1) hops of latency, and n (R - 1) / R / bandwidth: once to
                 reduce-scatter, once to all-gather (FSDP2 gathers again in backward)
    small        two all-reduces of the sums that the learned step needs, along a tree; one of a
                 number for AdamW
    rest         what a step takes beside these on one rank                       measured on one
                 rank

"exposed" adds it all up; "hidden" lets the reduce-scatter run under backward (two thirds of
compute) and the all-gather under forward.

Bytes have no free number: tests compare them with those that a real run hands to its collectives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pylo_dist.adapters.zero.buckets import ALIGNMENT, default_cap_mb, fill, sliced
from pylo_dist.core.shards import factored_dims
from pylo_dist.maths import reference

# and the sums that ride in A for VeLO's LSTM
FEATURES = {"AdafacLO": (reference.SMALL_FC, 0), "VeLO": (reference.VELO, 9)}
AUDIT, LOSS = 5, 4  # float64 numbers per tensor in front of A; of the loss behind it
# Numbers of a parameter group, of which ranks compare five digits and their squares, and say
# whether they are good; then three of how gradients were scaled meanwhile.
KEYS = {"AdafacLO": 5, "VeLO": 6, "AdamW": 7}
SCALING = 3
Shapes = Mapping[str, Sequence[int]]


# -------------------------------------------------------------------------------------------- bytes


def small_syncs(shapes: Shapes, optimizer: str) -> list[int]:
    """Bytes of the small all-reduces of a step on flat shards, float64: A, then B. AdamW:
    whether all can step, and what is compared.
    """
    compared = 10 * KEYS[optimizer] + 1 + SCALING
    if optimizer not in FEATURES:
        return [8 * (1 + compared)]
    features, extra = FEATURES[optimizer]
    dims = {fqn: factored_dims(tuple(shape)) for fqn, shape in shapes.items()}
    a = sum(
        AUDIT + extra + reference.num_gradient_sums(tuple(shapes[fqn]), found)
        for fqn, found in dims.items()
    )
    b = sum(features.num_sums(found) for found in dims.values())
    return [8 * (a + (LOSS if optimizer == "VeLO" else 0) + compared), 8 * b]


@dataclass(frozen=True, slots=True)
class Bytes:
    """What a step hands to its collectives, all ranks' parts of a buffer counted: what one rank
    sends is (R - 1) / R of it.

    Attributes:
        scatters: of every slice of a bucket. gathers: of every bucket.
        small: of the small all-reduces (of which a ring sends twice that share).
    """

    scatters: list[int]
    gathers: list[int]
    small: list[int]

    def sent(self, ranks: int) -> int:
        """Bytes that one rank sends in a step, by rings."""
        share = (ranks - 1) / ranks
        return round(share * (sum(self.scatters) + sum(self.gathers) + 2 * sum(self.small)))


def planned(
    shapes: Shapes, cap_mb: float | None, ranks: int
) -> list[tuple[int, list[tuple[int, int]]]]:
    """Of ZeroOptimizer's buckets, in the order of their departure, elements without padding and
    `Bucket.slices`; float32.

    Args:
        cap_mb: as its `bucket_cap_mb`.
    """
    named = [(fqn, torch.empty(tuple(shape), device="meta")) for fqn, shape in shapes.items()]
    cap_mb = cap_mb or default_cap_mb(sum(t.nbytes for _, t in named) / 2**20, ranks)
    found = []
    for chunk in fill(named, cap_mb):
        numel = sum(t.numel() for _, t in chunk)
        part = math.ceil(numel / (ranks * ALIGNMENT)) * ALIGNMENT
        found.append((numel, sliced(part, ranks, 4 * numel / 2**20, cap_mb)))
    return found


def zero_bytes(
    shapes: Shapes, optimizer: str, ranks: int, bucket_cap_mb: float | None = None
) -> Bytes:
    """Of ZeroOptimizer, either stage, float32. A rank's part is a multiple of ALIGNMENT; that of
    gradients ends with a flag.
    """
    if ranks == 1:
        return Bytes([], [], [])
    buckets = planned(shapes, bucket_cap_mb, ranks)
    return Bytes(
        scatters=[
            4 * ranks * (stop - first + ALIGNMENT)
            for _, slices in buckets
            for first, stop in slices
        ],
        gathers=[4 * ranks * slices[-1][1] for _, slices in buckets],
        small=small_syncs(shapes, optimizer),
    )


# --------------------------------------------------------------------------------------------- time


@dataclass(frozen=True, slots=True)
class Link:
    """Seconds of a hop, and bytes per second of one rank in one direction."""

    latency: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Network:
    """Ranks on nodes.

    Attributes:
        base: seconds that any collective takes to start.
        within, between: nodes; the slower bandwidth carries a ring over nodes.
        source: where the numbers come from.
    """

    name: str
    ranks_per_node: int
    base: float
    within: Link
    between: Link
    source: str

    def nodes(self, ranks: int) -> int:
        return math.ceil(ranks / self.ranks_per_node)

    def ring(self, size: int, ranks: int) -> float:
        """Seconds of a reduce-scatter or all-gather over a buffer of `size` bytes."""
        if ranks == 1:
            return 0.0
        across = self.nodes(ranks) - 1
        link = self.between if across else self.within
        hops = (ranks - 1 - across) * self.within.latency + across * self.between.latency
        return self.base + hops + size * (ranks - 1) / ranks / link.bandwidth

    def tree(self, size: int, ranks: int) -> float:
        """Seconds of an all-reduce of a small buffer: up and down a chain in each node and a tree
        over the nodes.
        """
        if ranks == 1:
            return 0.0
        nodes = self.nodes(ranks)
        link = self.between if nodes > 1 else self.within
        inner = min(ranks, self.ranks_per_node) - 1
        hops = 2 * (
            inner * self.within.latency + math.ceil(math.log2(nodes)) * self.between.latency
        )
        return self.base + hops + 2 * size / link.bandwidth


REACHED = 0.8  # of a datasheet's bandwidth


def _nccl(chip: str, nvlink: str, per_direction: float, infiniband: str, port: float) -> Network:
    """Nodes of eight GPUs; bytes per second of one GPU's NVLink in one direction, and of its
    port.
    """
    return Network(
        f"{chip} NVLink + {infiniband} InfiniBand",
        ranks_per_node=8,
        base=8.4e-6,
        within=Link(3.4e-6, REACHED * per_direction),
        between=Link(9.6e-6, REACHED * port),
        source=f"NVLink {nvlink} in both directions per GPU (NVIDIA {chip} datasheet); one "
        f"{8 * port / 1e9:.0f} Gb/s port per GPU (NVIDIA DGX {chip} datasheet); {REACHED} of both "
        "is assumed to be reached; latencies: NCCL's own tuning table, src/graph/tuning.cc of "
        "NVIDIA/nccl (ring: Simple, tree: LL)",
    )


_KNOWN = (
    _nccl("H200", "900 GB/s", 450e9, "NDR", 50e9),
    _nccl("A100", "600 GB/s", 300e9, "HDR", 25e9),
)
NETWORKS = {network.name: network for network in _KNOWN}


@dataclass(frozen=True, slots=True)
class Parts:
    """What is measured on one device: seconds per token of forward and backward, and per parameter
    of a step by optimizer.
    """

    token_s: float
    step_s: Mapping[str, float]
    rest_s: float = 0.0
    source: str = ""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of a step by part."""

    compute: float
    optimizer: float
    scatter: float
    gather: float
    small: float
    rest: float

    @property
    def exposed(self) -> float:
        """Nothing hidden."""
        return self.compute + self.optimizer + self.scatter + self.gather + self.small + self.rest

    @property
    def hidden(self) -> float:
        """The reduce-scatter under backward, the all-gather under forward."""
        forward, backward = self.compute / 3, self.compute * 2 / 3
        return (
            max(forward, self.gather)
            + max(backward, self.scatter)
            + self.optimizer
            + self.small
            + self.rest
        )


def step_times(
    parts: Parts,
    network: Network,
    shapes: Shapes,
    optimizer: str,
    *,
    ranks: int,
    tokens: int,
    layout: str = "zero",
    bucket_cap_mb: float | None = None,
    slowdown: float = 1.0,
) -> Times:
    """A step of `tokens` per rank.

    Args:
        layout: "zero"; "fsdp2", which gathers twice; "replicated", where every rank steps all
            parameters.
        slowdown: of whatever computes, where ranks share cores.
    """
    numel = sum(math.prod(shape) for shape in shapes.values())
    moved = zero_bytes(shapes, optimizer, ranks, bucket_cap_mb)
    share = numel if layout == "replicated" else numel / ranks
    gathers = (2 if layout == "fsdp2" else 1) * sum(
        network.ring(size, ranks) for size in moved.gathers
    )
    small = [] if layout == "replicated" else moved.small
    return Times(
        compute=slowdown * tokens * parts.token_s,
        optimizer=slowdown * share * parts.step_s[optimizer],
        scatter=sum(network.ring(size, ranks) for size in moved.scatters),
        gather=gathers,
        small=sum(network.tree(size, ranks) for size in small),
        rest=slowdown * parts.rest_s,
    )


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(seconds to start, seconds per byte) through (bytes, seconds): least squares of the relative
    error, neither below 0.
    """
    weights = [1.0 / seconds**2 for _, seconds in points]
    total = sum(weights)
    x = sum(w * size for w, (size, _) in zip(weights, points, strict=True)) / total
    y = sum(w * seconds for w, (_, seconds) in zip(weights, points, strict=True)) / total
    top = sum(
        w * (size - x) * (seconds - y) for w, (size, seconds) in zip(weights, points, strict=True)
    )
    slope = max(
        0.0, top / sum(w * (size - x) ** 2 for w, (size, _) in zip(weights, points, strict=True))
    )
    return max(0.0, y - slope * x), slope

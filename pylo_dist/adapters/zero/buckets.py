"""Flat memory of ZeRO: parameters packed into buckets, every bucket cut evenly over the ranks. Owns
the parameters' memory, and makes the pieces of it that the inner optimizer updates.

Every parameter becomes a view of its bucket. The cuts fall anywhere, whatever tensors lie there.

    bucket   | b.weight ........ | b.bias | a.weight ............... | padding |
    ranks    |        rank 0       |        rank 1       |        rank 2       |
    slices   |     0    |     1    |     0    |     1    |     0    |     1    |

A parameter is in one bucket. One that is large makes a large bucket, which travels in slices: the
same elements of every rank's part at a time, so that no copy on its way is as large as the bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ... import comm
from ...core.cuts import EvenCuts
from ...core.pieces import PieceParameter, ShardBinding, bind_shard, set_raw_grad
from ...core.shards import TensorShard
from .boxes import SliceLayout, boxes_by_slice
from .sharing import Sharing

T = TypeVar("T")

# A shard of a bucket starts at a multiple of this many elements, so that kernels and NCCL find
# aligned pointers.
ALIGNMENT = 16

# A ring passes on one rank's part of a bucket per hop. By the latencies in NCCL's tuning table, a
# hop between GPUs, eight a node with a 400 Gb/s port each, takes as long as 0.17 MB do: parts of
# 0.5 MB reach three quarters of the bandwidth; those of 25 MB on 512 ranks, 0.05 MB, a quarter.
# Buckets beyond a share of the model would win little of that, leave in fewer pieces beside
# backward, and hold memory: two copies are on their way while the gradients of a third one gather.
SMALLEST_CAP_MB = 25.0
MESSAGE_MB = 0.5
LARGEST_SHARE = 1 / 32

# Slices below this many MB would save no memory that counts, and cost a message each.
SMALLEST_SLICE_MB = 1.0

Named = tuple[str, Tensor]


@dataclass(frozen=True, slots=True)
class BucketParam:
    """A parameter in a bucket.

    Attributes:
        fqn: its full name.
        param: the model's tensor.
        offset, end: its place in the bucket.
        piece: what of it lies here, which the inner optimizer updates.
        binding: says so.
        first, stop: the place of that in this rank's part of the bucket.
    """

    fqn: str
    param: Tensor
    offset: int
    end: int
    piece: nn.Parameter
    binding: ShardBinding
    first: int
    stop: int

    @property
    def shard(self) -> TensorShard:
        return self.binding.shard


@dataclass(slots=True)
class Bucket:
    """A flat buffer of parameters of one dtype and device, cut evenly over the ranks.

    Attributes:
        flat: (ranks * shard_numel,) all parameters, padded with zeros.
        shard_numel: elements per rank.
        low: where this rank's begin.
        numel: elements without padding.
        members: in the order of their offsets.
        slices: first and stop, in every rank's part, of what is sent at a time; see `sliced`.
        master: (shard_numel,) this rank's parameters in float32, where they are stored in less; the
            pieces are views of it then.
        grad: (shard_numel,) this rank's part of the mean gradient, or None before the first
            reduction of a step.
    """

    flat: Tensor
    shard_numel: int
    low: int
    numel: int
    members: list[BucketParam]
    slices: list[tuple[int, int]]
    master: Tensor | None = None
    grad: Tensor | None = None
    _boxes: tuple[list[tuple[int, int]], list[SliceLayout]] | None = None

    @property
    def boxes(self) -> list[SliceLayout]:
        """Of every slice where its members lie in it."""
        if self._boxes is None or self._boxes[0] is not self.slices:
            extents = [(member.offset, member.end) for member in self.members]
            ranks = self.flat.numel() // max(1, self.shard_numel)
            found = boxes_by_slice(extents, self.numel, self.shard_numel, ranks, self.slices)
            self._boxes = self.slices, found
        return self._boxes[1]

    @property
    def shard(self) -> Tensor:
        """This rank's part of `flat`, a view."""
        return self.flat[self.low : self.low + self.shard_numel]

    def elements_of(self, rank: int) -> int:
        """How many elements rank holds, without padding."""
        return max(0, min((rank + 1) * self.shard_numel, self.numel) - rank * self.shard_numel)

    def piece_of(self, member: BucketParam, buffer: Tensor) -> Tensor:
        """The elements of a member in a buffer (shard_numel,) of this rank, a view."""
        return buffer[member.first : member.stop]

    def show_gradient(self, grad: Tensor | None) -> None:
        """Make `grad` (shard_numel,) the gradient of the pieces; None: drop it."""
        self.grad = grad
        for member in self.members:
            set_raw_grad(member.piece, None if grad is None else grad[member.first : member.stop])

    def refresh_master(self) -> None:
        """Where somebody else wrote a parameter (loading a model, say), its master follows;
        elsewhere it keeps its own bits.
        """
        if self.master is None:
            return
        for first, stop in self.slices:
            master, stored = self.master[first:stop], self.shard[first:stop]
            torch.where(
                master.to(stored.dtype) == stored, master, stored.to(master.dtype), out=master
            )

    def write_back(self) -> None:
        """Round the masters into this rank's part of the parameters."""
        if self.master is not None:
            self.shard.copy_(self.master)


def default_cap_mb(model_mb: float, ranks: int) -> float:
    """The size of buckets where none was asked for: 25 MB up to 50 ranks; beyond, what leaves
    MESSAGE_MB for each, but no more than LARGEST_SHARE of the model.

    Args:
        model_mb: of all parameters. ranks: a bucket is cut over.
    """
    return max(SMALLEST_CAP_MB, min(MESSAGE_MB * ranks, LARGEST_SHARE * model_mb))


def fill(named: Sequence[Named], cap_mb: float) -> list[list[Named]]:
    """Parameters of one dtype and device in chunks of about `cap_mb`, in about the order in which
    backward completes them.
    """
    open_: dict[tuple[torch.dtype, torch.device], tuple[list[Named], float]] = {}
    # with the place of the parameter that backward reaches last
    chunks: list[tuple[int, list[Named]]] = []
    for place, (fqn, param) in enumerate(reversed(named)):
        kind = (param.dtype, param.device)
        chunk, size = open_.pop(kind, ([], 0.0))
        chunk.append((fqn, param))
        size += param.numel() * param.element_size() / 2**20
        if size >= cap_mb:
            chunks.append((place, chunk))
        else:
            open_[kind] = chunk, size
    places = {id(param): place for place, (_, param) in enumerate(reversed(named))}
    chunks += [(places[id(chunk[-1][1])], chunk) for chunk, _ in open_.values()]
    return [chunk for _, chunk in sorted(chunks, key=lambda entry: entry[0])]


def sliced(shard_numel: int, ranks: int, size_mb: float, cap_mb: float) -> list[tuple[int, int]]:
    """Where the slices of a rank's part begin and end: as many as `cap_mb` goes into the bucket,
    alike but for ALIGNMENT, so that none has twice the cap.

    Args:
        shard_numel: elements of a rank's part. size_mb: of the bucket, by its parameters.
    """
    if ranks == 1 or shard_numel == 0:
        return [(0, shard_numel)]
    count = max(1, int(size_mb / max(cap_mb, SMALLEST_SLICE_MB)))
    width = -(-shard_numel // (count * ALIGNMENT)) * ALIGNMENT
    return [(first, min(first + width, shard_numel)) for first in range(0, shard_numel, width)]


@torch.no_grad()
def build(named: Sequence[Named], sharing: Sharing, cap_mb: float, with_master: bool) -> Bucket:
    """A bucket of these parameters, whose memory moves into it (`param.data` is replaced).

    Args:
        cap_mb: see `sliced`.
        with_master: keep this rank's part in float32 too if the parameters are bfloat16 or float16.
    """
    ranks, rank = sharing.ranks, sharing.rank
    numel = sum(param.numel() for _, param in named)
    shard_numel = -(-numel // (ranks * ALIGNMENT)) * ALIGNMENT
    low = rank * shard_numel
    first = named[0][1]
    flat = first.new_zeros(ranks * shard_numel)
    offsets, offset = [], 0
    for _, param in named:
        view = flat[offset : offset + param.numel()].view(param.shape)
        view.copy_(param)
        param.data = _own_storage(view)
        offsets.append(offset)
        offset += param.numel()
    slices = sliced(shard_numel, ranks, numel * flat.element_size() / 2**20, cap_mb)
    bucket = Bucket(flat, shard_numel, low, numel, [], slices)
    if with_master and first.dtype in (torch.bfloat16, torch.float16):
        bucket.master = bucket.shard.to(torch.float32)
    local = bucket.shard if bucket.master is None else bucket.master
    for (fqn, param), offset in zip(named, offsets, strict=True):
        peers = EvenCuts(fqn, tuple(param.shape), shard_numel, offset, ranks)
        mine = peers[rank]
        start = offset + mine.start - low if mine.numel else 0
        piece = PieceParameter(local[start : start + mine.numel], param)
        binding = bind_shard(piece, peers, rank, sharing.group, sharing.holders, sharing.replicas)
        end, stop = offset + param.numel(), start + mine.numel
        bucket.members.append(BucketParam(fqn, param, offset, end, piece, binding, start, stop))
    return bucket


def _own_storage(view: Tensor) -> Tensor:
    """The same memory under a storage of its own, as long as the view. Of parameters that lie in
    one storage, savers of safetensors (accelerate's) keep the first and drop the others.
    """
    if view.device.type not in ("cpu", "cuda"):
        return view
    return torch.utils.dlpack.from_dlpack(view)


def release(buckets: Sequence[Bucket]) -> None:
    """Give the parameters memory of their own again (`param.data` is replaced)."""
    for bucket in buckets:
        for member in bucket.members:
            member.param.data = member.param.data.clone()


def shard_group(
    group: dict[str, Any],
    buckets: list[Bucket],
    sharing: Sharing,
    cap_mb: float,
    with_master: bool,
) -> dict[str, Any]:
    """The group with every parameter replaced by its local piece; its parameters become views of
    new buckets, which are added to `buckets` (modified in place).

    Args:
        group: with its parameters as (fqn, tensor) pairs.
        cap_mb: see `fill` and `sliced`.
        with_master: see `build`.
    """
    pieces: dict[str, nn.Parameter] = {}
    for chunk in fill(group["params"], cap_mb):
        bucket = build(chunk, sharing, cap_mb, with_master)
        buckets.append(bucket)
        pieces.update({member.fqn: member.piece for member in bucket.members})
    named = [(fqn, pieces[fqn]) for fqn, _ in group["params"]]
    # torch takes a group without parameters for one without names
    return {**group, "params": named, **({} if named else {"param_names": []})}


def add_together(work: Callable[[], T], buckets: list[Bucket], sharing: Sharing) -> T:
    """`work()`, which adds buckets, alike on all ranks; where it fails they are given up, and the
    error reaches all. Collective.
    """
    before = len(buckets)

    def attempt() -> T:
        try:
            return work()
        except Exception:
            release(buckets[before:])
            del buckets[before:]
            raise

    return comm.together(attempt, sharing.holders)


@torch.no_grad()
def share_first_values(buckets: Sequence[Bucket], sharing: Sharing) -> None:
    """Every bucket <- that of the first rank. Collective."""
    for bucket in buckets:
        if sharing.group is not None:
            comm.broadcast(bucket.flat, 0, sharing.group)
        if sharing.replicate_group is not None:
            comm.broadcast(bucket.flat, 0, sharing.replicate_group)
        bucket.refresh_master()

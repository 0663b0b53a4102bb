"""State as checkpoints see it: one tensor of the unsharded optimizer's shape, of which each rank
holds some boxes.

`canonical` wraps a rank's state for saving, `local_part` takes a rank's elements out of whatever
was loaded. These two are all that the rest of the package knows about formats of sharded tensors.

    canonical shape (*copies, *shape)      local tensor (*copies, N)
    a shard's box of the parameter         the same box under every copy is one chunk of a
                                           checkpoint
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import comm
from ..core.pieces import ShardBinding, bound_shard
from ..core.shards import Shape, TensorShard
from ..core.state import StateField
from ..layouts.plain import is_dtensor, local_tensor

aten = torch.ops.aten
_GIVEN: set[int] = set()  # tensors, by id, see `given`


class ShardedState(Tensor):
    """A state tensor of canonical shape (*copies, *shape) of which this rank holds the elements of
    `shard`.

    torch.distributed.checkpoint saves and loads it; `clone`, `copy.deepcopy`, `.to(...)` and
    `copy_` of its own kind work on the local part. Anything else would need the other ranks and
    raises TypeError; `pylo_dist.full_state_dict` gathers whole tensors.

    Attributes:
        local: (*copies, N), not copied: what is loaded into this object lands there.
        copies: leading dimensions that are whole on every rank.
        shard: which elements of the rest the N are.
        beside_elements: whether they are all, on every rank with elements of the parameter, and
            none elsewhere, see `StateField`.
    """

    local: Tensor
    copies: Shape
    shard: TensorShard
    beside_elements: bool

    @staticmethod
    def __new__(
        cls, local: Tensor, copies: Shape, shard: TensorShard, beside_elements: bool = False
    ) -> ShardedState:
        assert tuple(local.shape) == (*copies, shard.numel), (tuple(local.shape), copies, shard)
        shape = (*copies, *shard.shape)
        whole: ShardedState = Tensor._make_wrapper_subclass(
            cls, shape, dtype=local.dtype, device=local.device
        )
        return whole

    def __init__(
        self, local: Tensor, copies: Shape, shard: TensorShard, beside_elements: bool = False
    ) -> None:
        self.local, self.copies, self.shard = local, copies, shard
        self.beside_elements = beside_elements

    def with_local(self, local: Tensor) -> ShardedState:
        """The same elements of another tensor."""
        return ShardedState(local, self.copies, self.shard, self.beside_elements)

    def parts(self) -> Iterator[tuple[Shape, Tensor]]:
        """Offsets of each box in the canonical tensor, and its view of the local memory."""
        for box in self.shard.boxes():
            yield (*(0 for _ in self.copies), *box.offsets), box.view(self.local)

    # what torch.distributed.checkpoint asks of a tensor; the types it wants are imported when it
    # does

    def __create_write_items__(self, fqn: str, _: Any) -> list[Any]:
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            MetadataIndex,
            TensorProperties,
        )
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        # of the whole tensor, which has no memory: newer torch notes its strides
        properties = TensorProperties.create_from_tensor(
            torch.empty(self.shape, dtype=self.dtype, device="meta")
        )
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(offsets), view.shape),
                    properties=properties,
                    size=self.size(),
                ),
            )
            for offsets, view in self.parts()
        ]

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [
            ChunkStorageMetadata(torch.Size(offsets), view.shape) for offsets, view in self.parts()
        ]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        for offsets, view in self.parts():
            if index.offset is not None and tuple(index.offset) == offsets:
                return view
        raise ValueError(
            f"{index.fqn!r}: this rank holds no block at {index.offset} of {self.shard.fqn!r}"
        )

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        handler = _OPS.get(func)
        if handler is None:
            raise TypeError(
                f"{func} on sharded optimizer state: a rank holds a part of it only. Save it with "
                "torch.distributed.checkpoint, or gather whole tensors with "
                "pylo_dist.full_state_dict(optimizer)"
            )
        return handler(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedState:
        if id(self) not in memo:
            memo[id(self)] = self.with_local(self.local.clone())
        copied: ShardedState = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"the state of {self.shard.fqn!r} is sharded, this rank holds a part of it, and "
            "torch.save and pickle would lose the rest. Save it with "
            "torch.distributed.checkpoint, or what pylo_dist.full_state_dict(optimizer) returns"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"ShardedState({self.shard.numel} of {self.shard.global_numel} elements of "
            f"{tuple(self.shape)}, {self.dtype})"
        )


def _new_empty(of: ShardedState, size: Sequence[int], **kwargs: Any) -> ShardedState:
    if tuple(size) != tuple(of.shape):
        raise TypeError(
            f"a new tensor of shape {tuple(size)} from sharded state of shape {tuple(of.shape)}: "
            "wanted the same shape"
        )
    return of.with_local(of.local.new_empty(of.local.shape, **kwargs))


def _copy(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(into, ShardedState):
        raise TypeError(
            "sharded state cannot be copied into a whole tensor; see pylo_dist.full_state_dict"
        )
    if isinstance(source, ShardedState) and source.shard == into.shard:
        into.local.copy_(source.local, non_blocking)
    else:
        copy_elements(source, into)
    return into


def _on_local(op: Callable[..., Tensor]) -> Callable[..., ShardedState]:
    return lambda of, *args, **kwargs: of.with_local(op(of.local, *args, **kwargs))


_OPS: dict[Any, Callable[..., Any]] = {
    **{
        op: _on_local(op)
        for op in (
            aten.detach.default,
            aten.alias.default,
            aten.clone.default,
            aten._to_copy.default,
            aten.empty_like.default,
            aten.zeros_like.default,
        )
    },
    aten.new_empty.default: _new_empty,
    aten.copy_.default: _copy,
}


def canonical(local: Tensor, field: StateField, binding: ShardBinding) -> Tensor:
    """A parameter's state tensor as a checkpoint has it: canonical shape, the memory of `local`.

    State that every rank holds whole is a plain tensor: `local` itself. That of a DTensor parameter
    is a DTensor already.
    """
    shard = binding.shard
    everywhere = field.replicated is not None and not field.beside_elements
    whole = everywhere or (binding.group is None and shard.is_whole)
    if whole or is_dtensor(local) or not shard.global_numel:
        return local
    return ShardedState(field.flat(local), field.copies, field.part(shard), field.beside_elements)


def local_part(source: Tensor, field: StateField, shard: TensorShard, like: Tensor) -> Tensor:
    """This rank's elements of loaded state: local shape, on the device of `like` and in the dtype
    of `source`. New memory, or that of `source`, where it was given away and fits as it is.

    Args:
        source: of canonical shape: a plain tensor, or a `ShardedState` or DTensor whose local part
            covers `shard`.

    Raises:
        ValueError: elements that `source` does not have on this rank.
    """
    shape = field.local_shape(shard)
    if (kept := _given(source, field, shard)) is not None and kept.device == like.device:
        return kept.view(shape)
    # a plain tensor of the local shape is all that is kept: of what is not whole, that is flat
    if type(source) is Tensor and (source.shape, source.device) == (shape, like.device):
        return source.detach().clone(memory_format=torch.contiguous_format)
    part = field.part(shard)
    local = torch.empty(shape, dtype=source.dtype, device=like.device)
    copy_elements(source, ShardedState(field.flat(local), field.copies, part))
    return local


@contextmanager
def given(sources: Sequence[Tensor]) -> Iterator[None]:
    """Around loading: whoever loads a tensor of these keeps its memory, which nobody else has; the
    first one alone.
    """
    _GIVEN.update(map(id, sources))
    try:
        yield
    finally:
        _GIVEN.difference_update(map(id, sources))


def _given(source: Tensor, field: StateField, shard: TensorShard) -> Tensor | None:
    """The memory of a tensor that was given away (it is no more) and has these elements alone."""
    if id(source) not in _GIVEN:
        return None
    _GIVEN.discard(id(source))
    part = field.part(shard)
    if isinstance(source, ShardedState):
        fits = (source.copies, source.shard) == (field.copies, part)
        return source.local if fits and source.local.is_contiguous() else None
    whole = part.is_whole and tuple(source.shape) == (*field.copies, *part.shape)
    fits = whole and not is_dtensor(source)
    own = source.untyped_storage().nbytes() == source.numel() * source.element_size()
    return source.detach() if fits and own and source.is_contiguous() else None


@torch.no_grad()
def copy_elements(source: Tensor, into: ShardedState) -> None:
    """Fill the local part of `into` (modified in place) from a tensor of the same canonical shape.

    Raises:
        ValueError: elements that `source` does not have on this rank.
    """
    missing = covering_gap(source, into.copies, into.shard)
    if missing:
        raise ValueError(
            f"{into.shard.fqn!r}: {missing} of its {into.local.numel()} elements on this rank are "
            "on other ranks in the state given; load it through torch.distributed.checkpoint, or "
            "give whole tensors (pylo_dist.full_state_dict)"
        )
    for offsets, target in into.parts():
        for source_offsets, part in _parts(source):
            overlap = _overlap(offsets, target.shape, source_offsets, part.shape)
            if overlap is not None:
                _narrow(target, offsets, overlap).copy_(_narrow(part, source_offsets, overlap))


def whole_tensor(state: ShardedState, binding: ShardBinding, wanted: bool) -> Tensor | None:
    """A state tensor whole, from the ranks that have its pieces, which all call it; None where it
    is not wanted.
    """
    result = state.local.new_empty(state.shape) if wanted else None
    peers: Iterable[tuple[int, TensorShard]] = enumerate(binding.peers or (binding.shard,))
    if state.beside_elements:  # the first that keeps it
        whole = TensorShard.whole(state.shard.fqn, state.shard.shape)
        peers = [next((source, whole) for source, peer in peers if peer.numel)]
    for source, peer in peers:
        if peer.numel:
            piece = (
                state.local
                if source == binding.rank
                else state.local.new_empty((*state.copies, peer.numel))
            )
            if binding.group is not None:
                comm.broadcast(piece, source, binding.group)
            if result is not None:
                for offsets, view in ShardedState(piece, state.copies, peer).parts():
                    result[
                        tuple(slice(o, o + n) for o, n in zip(offsets, view.shape, strict=True))
                    ] = view
    return result


def covering_gap(source: Tensor, copies: Shape, shard: TensorShard) -> int:
    """How many of the state elements (*copies, N) of `shard` the local part of `source` lacks."""
    have = 0
    lead = (0,) * len(copies)
    for box in shard.boxes():
        for source_offsets, part in _parts(source):
            overlap = _overlap(
                (*lead, *box.offsets), (*copies, *box.sizes), source_offsets, part.shape
            )
            have += 0 if overlap is None else math.prod(stop - first for first, stop in overlap)
    return math.prod(copies) * shard.numel - have


def _parts(source: Tensor) -> Iterator[tuple[Shape, Tensor]]:
    """Blocks of a canonical tensor that this rank holds: their offsets and values."""
    if isinstance(source, ShardedState):
        yield from source.parts()
    elif is_dtensor(source):  # one block
        chunks = source.__create_chunk_list__()  # type: ignore[attr-defined]
        for chunk in chunks:
            yield tuple(chunk.offsets), local_tensor(source)
    else:
        yield (0,) * source.dim(), source.detach()


def _overlap(
    offsets: Shape, sizes: Sequence[int], others: Shape, other_sizes: Sequence[int]
) -> list[tuple[int, int]] | None:
    """The block that two blocks share, as (first, stop) per dimension, or None."""
    shared = [
        (max(a, b), min(a + m, b + n))
        for a, m, b, n in zip(offsets, sizes, others, other_sizes, strict=True)
    ]
    return shared if all(first < stop for first, stop in shared) else None


def _narrow(part: Tensor, offsets: Shape, block: list[tuple[int, int]]) -> Tensor:
    """View of a block (first, stop per dimension of the canonical tensor) of a part that begins at
    `offsets`.
    """
    return part[
        tuple(
            slice(first - offset, stop - offset)
            for offset, (first, stop) in zip(offsets, block, strict=True)
        )
    ]


# --------------------------------------------------------- torch's elementwise optimizers on shards

_ELEMENT = StateField()
MASTER = (
    "master"  # state that only some layouts have: a float32 copy of a bfloat16 or float16 parameter
)
_OF_THE_TENSOR = ("step", "mu_product")  # state of torch's optimizers that is one number per tensor


def elementwise_state_dict(
    state_dict: dict[str, Any], groups: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the state_dict of one of torch's optimizers over bound 1-D pieces is for the whole
    parameters.

    Args:
        groups: the optimizer's own, with the pieces.
    """
    return {**state_dict, "state": dict(_each_entry(state_dict, groups, element_state))}


def elementwise_local_state(
    state_dict: dict[str, Any], groups: list[dict[str, Any]]
) -> dict[str, Any]:
    """What such an optimizer loads on this rank. Raises ValueError for state that does not fit, by
    parameter.
    """
    sizes, own = (
        [len(group["params"]) for group in g] for g in (state_dict["param_groups"], groups)
    )
    if sizes != own:
        raise ValueError(
            f"the state holds groups of {sizes} parameters, this optimizer groups of {own}"
        )
    return {**state_dict, "state": dict(_each_entry(state_dict, groups, element_part))}


def _each_entry(
    state_dict: dict[str, Any],
    groups: list[dict[str, Any]],
    convert: Callable[[str, Tensor, Tensor], Tensor],
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The state per parameter with its element state converted."""
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    for index, piece in zip(saved, (p for group in groups for p in group["params"]), strict=True):
        if index in state_dict["state"]:
            yield (
                index,
                {
                    name: convert(name, value, piece)
                    if isinstance(value, Tensor) and name not in _OF_THE_TENSOR
                    else value
                    for name, value in state_dict["state"][index].items()
                },
            )


def element_state(_: str, value: Tensor, piece: Tensor) -> Tensor:
    """A tensor (N,) beside a bound piece as a checkpoint has it; see `canonical`."""
    binding = bound_shard(piece)
    assert binding is not None
    if not binding.shard.global_numel or (binding.group is None and binding.shard.is_whole):
        return value.view(binding.shard.shape)
    return ShardedState(value, (), binding.shard)


def wrap_element(name: str, whole: Tensor, param: Tensor) -> Tensor:
    """New state like `whole`, of which this rank has its elements, for a parameter of torch's
    optimizers.
    """
    binding = bound_shard(param)
    if binding is None or name in _OF_THE_TENSOR:
        return whole.new_empty(
            whole.shape, device=whole.device if name in _OF_THE_TENSOR else param.device
        )
    return element_state(name, whole.new_empty(binding.shard.numel, device=param.device), param)


def element_part(name: str, value: Tensor, piece: Tensor) -> Tensor:
    """The elements (N,) of a bound piece out of loaded state; see `local_part`. Raises ValueError
    for another shape.
    """
    binding = bound_shard(piece)
    assert binding is not None
    shard = binding.shard
    if tuple(value.shape) != shard.shape:
        raise ValueError(
            f"state {name!r} of {shard.fqn!r}: found shape {tuple(value.shape)}, wanted shape "
            f"{shard.shape}"
        )
    return local_part(value, _ELEMENT, shard, piece).view(-1)

"""Where the elements lie that DeepSpeed's optimizer updates, found from its tables of partitions.
Writes nothing but the pieces it makes, views of DeepSpeed's memory.

    stages 1, 2     group   | w ........ | b | padding |
                            one flat tensor per parameter group, cut evenly over the ranks
    stage 3         w       | rank 0 | rank 1 | padding |
                            every parameter cut evenly, the parts of a sub-group side by side
    stage 0         whole tensors (float32 copies of them in bfloat16 and float16)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ... import comm
from ...core.cuts import EvenCuts
from ...core.pieces import bind_shard, bound_shard
from ...core.shards import TensorShard


@dataclass(slots=True)
class Slot:
    """The place of a parameter in a flat tensor: its name, the model's tensor, the local piece that
    is updated, and where that begins.
    """

    fqn: str
    param: Tensor
    piece: Tensor
    offset: int

    @property
    def shard(self) -> TensorShard:
        """Which elements of the parameter the piece has."""
        binding = bound_shard(self.piece)
        whole = TensorShard.whole(self.fqn, tuple(self.piece.shape))
        return whole if binding is None else binding.shard

    def part_of(self, flat: Tensor) -> Tensor:
        """The piece's elements in a tensor that is laid out as its flat one, a view."""
        return flat.narrow(0, self.offset, self.piece.numel())


@dataclass(slots=True)
class Source:
    """A tensor that DeepSpeed's optimizer updates.

    Attributes:
        flat: 1-D float32 partition on this rank, or a whole parameter (its only member is itself
            then).
        group: index of its parameter group.
        members: the parameters of its group or sub-group, also those of which this rank has no
            element.
        publish: brings `flat` to where DeepSpeed copies it after its optimizer's step; None: there
            is nothing to repeat.
        grad: the gradient of the step being collected.
    """

    flat: Tensor
    group: int
    members: list[Slot]
    publish: Callable[[], None] | None = None
    grad: Tensor | None = None

    @property
    def is_whole(self) -> bool:
        return len(self.members) == 1 and self.members[0].piece is self.flat

    def follow(self) -> None:
        """Make the pieces views of `flat` again where DeepSpeed has moved its memory
        (offload_states, reload_states).
        """
        if self.is_whole:
            return
        begin, size = self.flat.data_ptr(), self.flat.element_size()
        held = [member for member in self.members if member.piece.numel()]
        places = [member.piece.data_ptr() for member in held]
        if places != [begin + member.offset * size for member in held]:
            for member in held:
                member.piece.data = member.part_of(self.flat.detach())


@dataclass(slots=True)
class Layout:
    """Where the elements live that DeepSpeed's optimizer updates.

    Attributes:
        kind: "whole", "flat" (stages 1 and 2) or "split" (stage 3).
        group: the ranks that average gradients, and that share the tensors unless they are whole;
            None for a single rank.
        sources: in the order in which DeepSpeed steps them.
    """

    kind: str
    group: Any
    sources: list[Source] = field(default_factory=list)

    @property
    def ranks(self) -> int:
        return comm.size(self.group)

    @property
    def rank(self) -> int:
        return comm.rank(self.group)

    @property
    def cut(self) -> list[Source]:
        """The sources that are no whole tensors."""
        return [source for source in self.sources if not source.is_whole]

    def members(self) -> Iterator[tuple[int, Source, Slot]]:
        for i, source in enumerate(self.sources):
            for member in source.members:
                yield i, source, member

    def forget_gradients(self) -> None:
        """Drop what has been collected for a step."""
        for source in self.sources:
            source.grad = None


def find_layout(engine: Any) -> Layout:
    """The layout that a DeepSpeed engine has given its basic optimizer.

    Raises:
        ValueError: a wrapper of another kind.
    """
    wrapper, held = engine.optimizer, engine.basic_optimizer
    if wrapper is held:
        whole = [(i, p, p) for i, group in enumerate(held.param_groups) for p in group["params"]]
        return _whole(engine, whole)
    if hasattr(wrapper, "bit16_groups_flat"):
        return _flat(
            engine,
            wrapper.bit16_groups,
            wrapper.bit16_groups_flat,
            wrapper.single_partition_of_fp32_groups,
        )
    if hasattr(wrapper, "bf16_groups_flat"):
        return _flat(
            engine,
            wrapper.bf16_groups,
            wrapper.bf16_groups_flat,
            wrapper.fp32_groups_flat_partition,
        )
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return _split(engine)
    if hasattr(wrapper, "fp32_groups") and hasattr(wrapper, "fp16_groups"):
        both = [
            zip(*pair, strict=True)
            for pair in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        ]
        return _whole(
            engine, [(i, p, master) for i, pairs in enumerate(both) for p, master in pairs]
        )
    raise ValueError(
        f"DeepSpeed wrapped the optimizer in {type(wrapper).__name__}, whose partitions are not "
        "known here"
    )


def _shared(group: Any) -> Any:
    # a single rank holds everything: nothing to communicate
    return group if comm.size(group) > 1 else None


def _whole(engine: Any, params: list[tuple[int, Tensor, Tensor]]) -> Layout:
    layout = Layout("whole", _shared(engine.seq_data_parallel_group))
    for i, param, master in params:
        if not param.requires_grad:  # as the other stages
            continue
        layout.sources.append(
            Source(master, i, [Slot(engine.param_names[param], param, master, 0)])
        )
    return layout


def _flat(
    engine: Any, groups: list[list[Tensor]], wholes: list[Tensor], partitions: list[Tensor]
) -> Layout:
    """Stages 1 and 2: group i lies in `wholes[i]`, and `partitions[i]` is this rank's part of it in
    float32.
    """
    wrapper = engine.optimizer
    layout = Layout("flat", _shared(wrapper.dp_process_group))
    for i, (params, whole, partition) in enumerate(zip(groups, wholes, partitions, strict=True)):
        source, part = Source(partition, i, []), partition.numel()
        for param in params:
            # where it really lies: round-robin order and alignment are in it
            offset = int(param.data.storage_offset() - whole.storage_offset())
            numel, fqn = param.numel(), engine.param_names[param]
            if numel and param.data_ptr() != whole.data_ptr() + offset * whole.element_size():
                raise ValueError(
                    f"{fqn!r} does not lie in the flat tensor of its group; was the model moved "
                    "after initialize?"
                )
            peers = EvenCuts(fqn, tuple(param.shape), part, offset, layout.ranks)
            begin = offset + peers[layout.rank].start - layout.rank * part
            source.members.append(_bound(fqn, param, peers, partition, begin, layout))
        if hasattr(wrapper, "parallel_partitioned_bit16_groups"):
            source.publish = _copier(
                wrapper.parallel_partitioned_bit16_groups[i], layout.rank, partition
            )
        layout.sources.append(source)
    return layout


def _copier(parts: Sequence[Tensor], rank: int, partition: Tensor) -> Callable[[], None]:
    def copy() -> None:
        parts[rank].data.copy_(partition.data)

    return copy


def _split(engine: Any) -> Layout:
    """Stage 3: a sub-group's flat tensor holds this rank's part of each of its parameters, padded
    to equal parts.
    """
    wrapper = engine.optimizer
    layout = Layout("split", _shared(wrapper.dp_process_group))
    for j, (params, flat) in enumerate(
        zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True)
    ):
        source = Source(flat, wrapper.sub_group_to_group_id[j], [])
        offset = 0
        for param in params:
            fqn = engine.param_names[param]
            part = int(param.partition_numel())
            peers = EvenCuts(fqn, tuple(param.ds_shape), part, 0, layout.ranks)
            source.members.append(_bound(fqn, param, peers, flat, offset, layout))
            offset += part
        if offset != flat.numel():
            raise ValueError(
                f"sub-group {j} has {flat.numel()} elements on this rank, its parameters {offset}"
            )
        source.publish = _reassigner(wrapper, j)
        layout.sources.append(source)
    return layout


def _reassigner(wrapper: Any, sub_group: int) -> Callable[[], None]:
    def reassign() -> None:
        wrapper._reassign_or_swap_out_partitioned_parameters(sub_group)

    return reassign


def _bound(
    fqn: str, param: Tensor, peers: Sequence[TensorShard], flat: Tensor, offset: int, layout: Layout
) -> Slot:
    numel = peers[layout.rank].numel
    offset = min(max(offset, 0), flat.numel())
    piece = nn.Parameter(flat.detach()[offset : offset + numel])
    bind_shard(piece, peers, layout.rank, layout.group)
    return Slot(fqn, param, piece, offset)

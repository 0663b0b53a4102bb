"""DeepSpeed, stages 0 to 3: an exact learned step on the partitions that DeepSpeed made.

DeepSpeed hands its optimizer flat pieces of the parameters, a few at a time, and expects
elementwise arithmetic. Here it holds a `DeepSpeedOptimizer`, which collects the gradients of all
flat tensors of a step, takes the learned step once over local views of them, and repeats
DeepSpeed's write-back where that has happened too early. Reads DeepSpeed's tables of partitions;
writes its flat float32 tensors and the copies made from them.

    stages 1, 2     group   | w ........ | b | padding |     one flat tensor per parameter group, cut evenly over the ranks
    stage 3         w       | rank 0 | rank 1 | padding |    every parameter cut evenly, the parts of a sub-group side by side
    stage 0                                                  whole tensors (float32 copies of them in bfloat16 and float16)
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ... import comm
from ...core.pieces import bind_shard, bound_shard
from ...core.shards import TensorShard
from ...optimizer import LearnedOptimizer
from ...optimizer.report import Report
from ...optimizer.sharded_state import ShardedState

STATE_KEY = "pylo_dist"  # in the optimizer state of DeepSpeed's files

# JSON entries that would do again what DeepSpeed does, and what to use instead.
_DEEPSPEEDS = {
    "max_grad_norm": 'DeepSpeed clips before the optimizer sees a gradient: use "gradient_clipping" beside "optimizer"',
    "clip_grad": 'DeepSpeed clips before the optimizer sees a gradient: use "gradient_clipping" beside "optimizer"',
    "clip_norm": 'DeepSpeed clips before the optimizer sees a gradient: use "gradient_clipping" beside "optimizer"',
    "clip": 'DeepSpeed clips before the optimizer sees a gradient: use "gradient_clipping" beside "optimizer"',
    "process_group": "DeepSpeed says which ranks share the data: leave it out",
}
_NO_LOSS = (
    "this optimizer reads the training loss, and there was none since the last step: call "
    "engine.backward(loss) in place of loss.backward(), or engine.basic_optimizer.set_loss(loss) "
    "before engine.step()"
)


@dataclass(slots=True)
class Member:
    """A parameter in a flat tensor: its name, the model's tensor, the local piece that is updated,
    and where that begins.
    """

    fqn: str
    param: Tensor
    piece: Tensor
    offset: int


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
        is nothing to repeat. grad: the gradient of the step being collected.
    """

    flat: Tensor
    group: int
    members: list[Member]
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
        flat, size = self.flat.detach(), self.flat.element_size()
        for member in self.members:
            if (
                member.piece.numel()
                and member.piece.data_ptr() != flat.data_ptr() + member.offset * size
            ):
                member.piece.data = flat[member.offset : member.offset + member.piece.numel()]


@dataclass(slots=True)
class Layout:
    """Where the elements live that DeepSpeed's optimizer updates.

    Attributes:
        kind: "whole", "flat" (stages 1 and 2) or "split" (stage 3).
        group: the ranks that average gradients, and that share the tensors unless they are whole;
        None for a single rank. sources: in the order in which DeepSpeed steps them.
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

    def members(self) -> Iterator[tuple[int, Source, Member]]:
        for i, source in enumerate(self.sources):
            for member in source.members:
                yield i, source, member


# ------------------------------------------------------------------------------------------ layouts


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
            Source(master, i, [Member(engine.param_names[param], param, master, 0)])
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
            cuts = [min(max(rank * part - offset, 0), numel) for rank in range(layout.ranks + 1)]
            peers = [TensorShard.interval(fqn, tuple(param.shape), a, b) for a, b in pairwise(cuts)]
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
            fqn, part, numel = (
                engine.param_names[param],
                int(param.partition_numel()),
                int(param.ds_numel),
            )
            cuts = [min(rank * part, numel) for rank in range(layout.ranks + 1)]
            peers = [
                TensorShard.interval(fqn, tuple(param.ds_shape), a, b) for a, b in pairwise(cuts)
            ]
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
    fqn: str, param: Tensor, peers: list[TensorShard], flat: Tensor, offset: int, layout: Layout
) -> Member:
    numel = peers[layout.rank].numel
    offset = min(max(offset, 0), flat.numel())
    piece = nn.Parameter(flat.detach()[offset : offset + numel])
    bind_shard(piece, peers, layout.rank, layout.group)
    return Member(fqn, param, piece, offset)


# ---------------------------------------------------------------------------------------- optimizer


class DeepSpeedOptimizer(torch.optim.Optimizer):
    """What DeepSpeed holds for a learned optimizer; `inner`, made by `attach`, is the learned
    optimizer itself.

    Until then a step does nothing: DeepSpeed takes some while it sets itself up. `param_groups` are
    DeepSpeed's view; what schedulers write there (lr) reaches the inner optimizer at every step.

    Args:
        params: as DeepSpeed gives them: parameters or groups, whole or partitioned already
            (deepspeed.zero.Init).
        **kwargs: the "params" of the JSON entry, the face's keyword arguments.

    Raises:
        ValueError: an argument that is unknown, missing or cannot be served, or weights that do not
            fit; on every rank.
    """

    face: ClassVar[type[LearnedOptimizer]]

    def __init__(self, params: Any, **kwargs: Any) -> None:
        # tried on one number: what is wrong with the arguments or the weights is said before
        # anything is built
        probe = self._together(lambda: self._probe(kwargs))
        self._kwargs = {**_checked_arguments(self.face, kwargs), "weights": probe.weights}
        self._defaults = probe.defaults
        super().__init__(params, probe.defaults)
        self._inner: LearnedOptimizer | None = None
        self._layout = Layout("whole", None)
        self._by_flat: dict[int, Source] = {}
        self._groups: list[dict[str, Any]] = self.param_groups
        self._engine: Any = lambda: None
        self._present: set[str] = set()
        self._seen_loss: Tensor | None = None
        self._given_loss: Tensor | None = None
        self._at = 0

    def _probe(self, given: dict[str, Any]) -> LearnedOptimizer:
        kwargs = _checked_arguments(self.face, given)
        if "width_mults" in _names(self.face):
            kwargs["width_mults"] = {}  # named parameters, which are known in attach
        return self.face([("probe", nn.Parameter(torch.zeros(1)))], **kwargs)

    def _together(self, work: Callable[[], LearnedOptimizer]) -> LearnedOptimizer:
        """`work()`, which calls no collective; an error of one rank is raised on all, with the
        place in the JSON.
        """

        def named() -> LearnedOptimizer:
            try:
                return work()
            except (ValueError, TypeError) as error:
                where = f'DeepSpeed JSON, "params" of "optimizer" ("type": "{self.face.__name__}")'
                raise ValueError(f"{where}: {error}") from error

        return comm.together(named, comm.default_group(), ValueError)

    # --------------------------------------------------------------------------------------- attach

    def attach(self, engine: Any) -> None:
        """Build the inner optimizer on the engine's partitions and listen to its losses. Alike on
        all ranks, once.
        """
        layout = find_layout(engine)
        self._inner = self._together(lambda: self._build(layout))
        # what schedulers set since the last step is saved too, and what is loaded counts from now
        # on
        self._inner.register_state_dict_pre_hook(lambda _: self._bring_settings())
        self._inner.register_load_state_dict_post_hook(lambda _: self._settings_follow())
        self._layout = layout
        self._by_flat = {id(source.flat): source for source in layout.sources}
        self._groups = self.param_groups
        self._engine = weakref.ref(engine)
        self._at = engine.global_steps
        for _, _, member in layout.members():
            if member.param.requires_grad:
                member.param.register_post_accumulate_grad_hook(self._noter(member.fqn))
        if self._inner.rule.needs_loss:
            self._listen(engine)

    def _build(self, layout: Layout) -> LearnedOptimizer:
        groups: list[dict[str, Any]] = [
            {**{key: value for key, value in group.items() if key != "params"}, "params": []}
            for group in self.param_groups
        ]
        originals: list[tuple[str, Tensor]] = []
        for _, source, member in layout.members():
            groups[source.group]["params"].append((member.fqn, member.piece))
            originals.append((member.fqn, member.param))
        for i, group in enumerate(groups):
            for key in ("max_grad_norm", "clip_grad"):
                if group.get(key):
                    raise ValueError(
                        f"parameter group {i} has {key}={group[key]!r}: {_DEEPSPEEDS[key]}"
                    )
        kwargs = self.face.before_sharding(originals, self._kwargs)
        # the ranks that average gradients average the loss
        return self.face(
            groups,
            **{**kwargs, "process_group": layout.group if layout.group is not None else False},
        )

    def _noter(self, fqn: str) -> Callable[[Tensor], None]:
        """A hook that notes that a parameter has a gradient; DeepSpeed itself fills in zeros for
        those without.
        """
        find = weakref.ref(self)  # the model may outlive this optimizer

        def note(_: Tensor) -> None:
            held = find()
            if held is not None:
                held._drop_what_a_skipped_step_left()
                held._present.add(fqn)

        return note

    def _listen(self, engine: Any) -> None:
        """Wrap `engine.backward`, on this engine alone, to keep the losses it is given."""
        backward = engine.backward

        def keeping_the_loss(
            loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True, **kwargs: Any
        ) -> Any:
            result = backward(
                loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas, **kwargs
            )
            self._drop_what_a_skipped_step_left()
            part = loss.detach().to(torch.float64) / (
                engine.gradient_accumulation_steps() if scale_wrt_gas else 1
            )
            self._seen_loss = part if self._seen_loss is None else self._seen_loss + part
            return result

        engine.backward = keeping_the_loss

    def _drop_what_a_skipped_step_left(self) -> None:
        """DeepSpeed counts a step it skipped (inf, NaN) without calling its optimizer."""
        engine = self._engine()
        if engine is not None and engine.global_steps != self._at:
            self._at = engine.global_steps
            self._forget()

    def _forget(self) -> None:
        self._present.clear()
        self._seen_loss = self._given_loss = None
        for source in self._layout.sources:
            source.grad = None

    @property
    def attached(self) -> bool:
        return self._inner is not None

    @property
    def inner(self) -> LearnedOptimizer:
        """The learned optimizer over this rank's pieces. Raises RuntimeError before `attach`."""
        if self._inner is None:
            raise RuntimeError(
                "not attached to a DeepSpeed engine yet: call pylo_dist.deepspeed.attach(engine)"
            )
        return self._inner

    @property
    def layout(self) -> Layout:
        return self._layout

    # ----------------------------------------------------------------------------------------- step

    def set_loss(self, loss: Tensor | float) -> None:
        """Give the loss of the coming step, this rank's mean over its micro-batches; those
        engine.backward saw do not count.
        """
        self._drop_what_a_skipped_step_left()
        self._given_loss = torch.as_tensor(loss).detach()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Called by DeepSpeed, once for every flat tensor or once for all: the last call of a step
        takes it.

        Raises:
            NonFiniteGradientError, ValueError, PeerError: as `LearnedOptimizer.step`; nothing has
                changed then.
        """
        if closure is not None:
            raise ValueError(
                "step(closure): under DeepSpeed call engine.backward(loss) and engine.step()"
            )
        if self._inner is None:
            return
        last: Source | None = None
        for group in self.param_groups:
            for flat in group["params"]:
                last = self._by_flat.get(id(flat))
                if last is None:  # frozen, stage 0
                    continue
                # left by a step that broke off between two calls
                if last.grad is not None and not last.is_whole:
                    for source in self._layout.sources:
                        source.grad = None
                last.grad = flat.grad
        if not all(source.grad is not None or source.is_whole for source in self._layout.sources):
            return
        try:
            self._bring_gradients()
            self._bring_settings()
            if self._inner.rule.needs_loss:
                loss = self._seen_loss if self._given_loss is None else self._given_loss
                if loss is None:  # raised in the step, where the other ranks hear of it too
                    self._inner.fail_next_step(ValueError(_NO_LOSS))
                else:
                    self._inner.set_loss(loss)
            self._inner.step()
        except Exception:  # DeepSpeed puts its groups back after a step that returns only
            if self._layout.kind == "split":
                for group in self._groups:
                    group["params"] = []
            self.param_groups = self._groups
            raise
        finally:
            self._forget()
            for _, source, member in self._layout.members():
                if not source.is_whole:
                    member.piece.grad = None
        for source in self._layout.sources:
            if source is not last and source.publish is not None:
                source.publish()

    def _bring_gradients(self) -> None:
        """The gradients of the pieces are views of the flat ones; a parameter that backward left
        out has none.
        """
        present = self._present
        if self._layout.kind == "whole":
            members = [member for _, _, member in self._layout.members()]
            # DeepSpeed fills in zeros; every rank must pass over the same tensors
            if self._layout.group is not None:
                first = members[0].piece
                votes = torch.tensor(
                    [float(m.fqn in present) for m in members], device=first.device
                )
                comm.serve([[(self._layout.group, votes)]])
                present = {m.fqn for m, vote in zip(members, votes.tolist(), strict=True) if vote}
            for member in members:
                if member.fqn not in present:
                    member.piece.grad = None
            return
        for _, source, member in self._layout.members():
            source.follow()
            assert source.grad is not None
            member.piece.grad = source.grad[member.offset : member.offset + member.piece.numel()]
            binding = bound_shard(member.piece)
            assert binding is not None
            binding.present = member.fqn in present

    def _bring_settings(self) -> None:
        for mine, its in zip(self._groups, self.inner.param_groups, strict=True):
            its.update({key: mine[key] for key in self._defaults if key in mine})

    # ---------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """This rank's part, as engine.save_checkpoint writes it: plain tensors, with the layout
        they belong to.
        """
        groups = [
            {**{k: v for k, v in group.items() if k != "params"}, "params": []}
            for group in self._groups
        ]
        state: dict[str, Any] = {"state": {}, "param_groups": groups}
        if self._inner is None:
            return state
        inner = self._inner.state_dict()
        inner["state"] = {
            i: {k: _to_plain(v) for k, v in entry.items()} for i, entry in inner["state"].items()
        }
        return {**state, STATE_KEY: {"layout": self.describe_layout(), "optimizer": inner}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned on this rank of the same layout; engine.load_checkpoint
        calls it.

        Raises:
            ValueError: state of another optimizer or layout; nothing has been changed then.
        """
        saved, own = state_dict.get(STATE_KEY), self.describe_layout()
        if saved is None:
            raise ValueError(
                f"the checkpoint has no {STATE_KEY!r} in its optimizer: it was not saved by "
                f"{self.face.__name__}"
            )
        if saved["layout"] != own:
            differing = next(key for key in own if saved["layout"].get(key) != own[key])
            found, wanted = (str(layout[differing])[:200] for layout in (saved["layout"], own))
            raise ValueError(
                f"the checkpoint was saved with {differing} {found}, here it is {wanted}; load it "
                "with pylo_dist.deepspeed.load_checkpoint(engine, folder), which serves any "
                "number of ranks and stage"
            )
        shards = [
            TensorShard.interval(fqn, tuple(shape), at, at + n)
            for fqn, shape, at, n, _, _ in own["pieces"]
        ]
        inner = saved["optimizer"]
        state = {
            i: {k: _from_plain(v, shards[i]) for k, v in entry.items()}
            for i, entry in inner["state"].items()
        }
        self.inner.load_state_dict({**inner, "state": state})

    def describe_layout(self) -> dict[str, Any]:
        """What a checkpoint says about this rank's pieces: per parameter, in the inner optimizer's
        order, its name, global shape, first element and number of elements here, and where they
        lie: number of the flat tensor, offset in it."""
        order = {
            id(p): i
            for i, p in enumerate(p for group in self.inner.param_groups for p in group["params"])
        }
        pieces: list[list[Any]] = [[]] * len(order)
        for number, source, member in self._layout.members():
            binding = bound_shard(member.piece)
            shard = (
                binding.shard
                if binding is not None
                else TensorShard.whole(member.fqn, tuple(member.piece.shape))
            )
            place = [-1, 0] if source.is_whole else [number, member.offset]
            pieces[order[id(member.piece)]] = [
                shard.fqn,
                list(shard.shape),
                shard.start,
                shard.numel,
                *place,
            ]
        layout = self._layout
        # whole tensors: rank 0 saves for all
        rank, ranks = (0, 1) if layout.kind == "whole" else (layout.rank, layout.ranks)
        return {"kind": layout.kind, "ranks": ranks, "rank": rank, "pieces": pieces}

    def _settings_follow(self) -> None:
        """Settings loaded into the inner optimizer (lr) are those of DeepSpeed's groups from now
        on.
        """
        for mine, its in zip(self._groups, self.inner.param_groups, strict=True):
            mine.update({key: its[key] for key in (*self._defaults, "initial_lr") if key in its})

    # ---------------------------------------------------------------------------------------- views

    def extend(self, num_steps: int) -> None:
        """See `VeLO.extend`; call it alike on all ranks."""
        extend = getattr(self.inner, "extend", None)
        if extend is None:
            raise TypeError(f"{self.face.__name__} has no length of run to extend")
        extend(num_steps)
        for group in self._groups:
            group["num_steps"] = num_steps

    @property
    def weights(self) -> Any:
        """The learned weights."""
        return self.inner.weights

    @property
    def grad_norm(self) -> Tensor:
        """See `LearnedOptimizer.grad_norm`; of the gradients as DeepSpeed clipped them."""
        return self.inner.grad_norm

    def stats(self) -> dict[str, dict[str, Tensor]]:
        """See `LearnedOptimizer.stats`."""
        return self.inner.stats()

    def report(self) -> Report:
        """The inner optimizer's report, with DeepSpeed's part in it."""
        report, engine, layout = self.inner.report(), self._engine(), self._layout
        bound = engine.gradient_clipping()
        clipping = f"gradient_clipping {bound:g} by DeepSpeed" if bound else "no gradient clipping"
        stage = engine.zero_optimization_stage()
        report.heading.append(
            f"DeepSpeed stage {int(stage)} ({type(engine.optimizer).__name__}), rank {layout.rank} "
            f"of {layout.ranks}, {len(layout.sources)} flat tensors; {clipping}, none by pylo_dist"
        )
        return report


def _to_plain(value: Tensor) -> Any:
    """State as torch.save can write it: of a piece its local elements."""
    return (
        {"local": value.local, "copies": list(value.copies)}
        if isinstance(value, ShardedState)
        else value
    )


def _from_plain(value: Any, shard: TensorShard) -> Tensor:
    if isinstance(value, dict):
        return ShardedState(value["local"], tuple(value["copies"]), shard)
    plain: Tensor = value
    return plain


def _names(face: type[LearnedOptimizer]) -> set[str]:
    """The keyword arguments of a face, also those it passes on to the class it derives from."""
    names: set[str] = set()
    for cls in face.__mro__:
        if cls is LearnedOptimizer:
            break
        parameters = inspect.signature(cls).parameters.values()
        names |= {p.name for p in parameters if p.kind == p.KEYWORD_ONLY}
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return names


def _checked_arguments(face: type[LearnedOptimizer], given: dict[str, Any]) -> dict[str, Any]:
    """`given`, with our own clipping off. Raises ValueError naming the JSON key."""
    names = _names(face)
    for key, value in given.items():
        if (
            key in _DEEPSPEEDS
            and key in names | {"max_grad_norm"}
            and not (key == "clip_grad" and value is False)
        ):
            raise ValueError(f'"{key}": {value!r}: {_DEEPSPEEDS[key]}')
        if key not in names:
            known = ", ".join(sorted(names - set(_DEEPSPEEDS)))
            raise ValueError(f'"{key}" is no parameter of {face.__name__}; wanted some of {known}')
    required = [
        p.name
        for p in inspect.signature(face).parameters.values()
        if p.kind == p.KEYWORD_ONLY and p.default is p.empty and p.name not in given
    ]
    if required:
        meaning = ", the length of the run in steps" if required == ["num_steps"] else ""
        raise ValueError(f'"{required[0]}" is missing{meaning}')
    return {**given, "clip_grad": False} if "clip_grad" in names else dict(given)

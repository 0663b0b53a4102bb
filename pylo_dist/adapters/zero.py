"""ZeRO over torch.distributed: gradients are reduce-scattered, each rank steps on its shard, parameters are all-gathered.

Owns the model's parameter memory: every parameter becomes a view of a flat bucket, and each bucket is cut evenly over the ranks,
at any element, whatever tensors lie there.

    bucket   | b.weight ........ | b.bias | a.weight ............... | padding |
    ranks    |        rank 0       |        rank 1       |        rank 2       |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import comm
from ..optimizer import LearnedOptimizer
from ..report import Report, report_row
from ..sharded_state import elementwise_local_state, elementwise_state_dict
from ..shards import PieceParameter, TensorShard, bind_shard, bound_shard
from .plain import check_param

# A shard of a bucket starts at a multiple of this many elements, so that kernels and NCCL find aligned pointers.
ALIGNMENT = 16

# Optimizers of torch whose update of an element depends on that element alone; any other would be silently wrong on a shard.
ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
)


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter in a bucket: its full name, the model's tensor, its place, and the local piece the inner optimizer updates."""

    fqn: str
    param: Tensor
    offset: int
    piece: nn.Parameter


@dataclass(slots=True)
class Bucket:
    """A flat buffer of parameters of one dtype and device, cut evenly over the ranks.

    Attributes:
        flat: (ranks * shard_numel,) all parameters, padded with zeros.
        shard_numel: elements per rank.
        numel: elements without padding.
        members: in the order of their offsets.
        grad: (shard_numel,) this rank's part of the mean gradient, or None before the first reduction.
    """

    flat: Tensor
    shard_numel: int
    numel: int
    members: list[Member]
    grad: Tensor | None = None

    def bounds(self, rank: int) -> tuple[int, int]:
        return rank * self.shard_numel, (rank + 1) * self.shard_numel

    def elements_of(self, rank: int) -> int:
        """How many elements rank holds, without padding."""
        low, high = self.bounds(rank)
        return max(0, min(high, self.numel) - low)


class ZeroOptimizer(torch.optim.Optimizer):
    """Any learned optimizer (or elementwise optimizer of torch) with gradients, state and step sharded over ranks.

    The step equals that of one process to the layout tolerance: cuts fall anywhere, and every whole-tensor quantity is summed
    over the ranks. At construction rank 0's parameters are given to all ranks, as DDP does. Gradients are averaged over ranks.
    `param_groups` hold this rank's 1-D pieces and, after the reduction, their gradients.

    Args:
        model_or_params: a module (all its trainable parameters), or what optimizers take: parameters, groups, named parameters.
        optimizer_class: e.g. `pylo_dist.AdafacLO`; or torch.optim's AdamW and its like. A parameter without gradient on any rank
            is passed over by learned optimizers; torch's see a gradient of zeros.
        stage: 1.
        process_group: the ranks that share the parameters; None: the world, or a single rank where torch.distributed is not
            initialised.
        replicate_group: not available yet.
        bucket_cap_mb: a bucket is closed when it reaches this size; a parameter is never split over two.
        reduce_dtype: dtype in which gradients are averaged; None: the parameter's, float32 for bfloat16 and float16.
        **optimizer_kwargs: for `optimizer_class`.

    Raises:
        ValueError: a setting or parameter that cannot be served, or a model that is not the same on every rank (on all ranks).
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        optimizer_class: type[torch.optim.Optimizer],
        *,
        stage: int = 1,
        process_group: Any = None,
        replicate_group: Any = None,
        bucket_cap_mb: float = 25,
        reduce_dtype: torch.dtype | None = None,
        **optimizer_kwargs: Any,
    ) -> None:
        if stage != 1:
            raise ValueError(f"stage={stage!r}: wanted 1; stage 2 is not available yet")
        if replicate_group is not None:
            raise ValueError("replicate_group is not available yet; leave it out")
        if not bucket_cap_mb > 0:
            raise ValueError(f"bucket_cap_mb={bucket_cap_mb!r}: wanted a number > 0")
        if reduce_dtype is not None and not reduce_dtype.is_floating_point:
            raise ValueError(f"reduce_dtype={reduce_dtype}: wanted a floating-point dtype or None")
        if not issubclass(optimizer_class, LearnedOptimizer) and optimizer_class not in ELEMENTWISE:
            known = ", ".join(c.__name__ for c in ELEMENTWISE)
            raise ValueError(
                f"{optimizer_class.__name__} may read whole tensors and would be silently wrong on shards; wanted a learned "
                f"optimizer of pylo_dist or one of {known}"
            )
        group = comm.default_group() if process_group is None else (process_group or None)
        self.ranks, self.rank = comm.size(group), comm.rank(group)
        self.group = group if self.ranks > 1 else None  # a single rank holds everything: nothing to communicate
        self.buckets: list[Bucket] = []
        self._cap_mb = bucket_cap_mb
        self._reduce_dtype = reduce_dtype
        self._ready = False
        self._given = dict(optimizer_kwargs)
        self._frozen = _frozen_params(model_or_params)
        groups = [_named_group(i, group) for i, group in enumerate(_as_groups(model_or_params))]
        self._check_same_on_all_ranks(groups)
        if issubclass(optimizer_class, LearnedOptimizer):
            named = [pair for group in groups for pair in group["params"]]
            optimizer_kwargs = cast(type[LearnedOptimizer], optimizer_class).before_sharding(named, optimizer_kwargs)
        local_groups = [self._shard_group(group) for group in groups]
        self.inner = optimizer_class(local_groups, **optimizer_kwargs)
        self._check_same_settings()
        if isinstance(self.inner, LearnedOptimizer):  # the loss is averaged over the ranks that share the parameters
            self.inner.process_group = self.group if self.group is not None else False
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self._share_groups()
        self._ready = True

    # --------------------------------------------------------------------------------------- buckets

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Shard more parameters; all ranks must add the same ones."""
        if not self._ready:  # called by torch's constructor for the inner optimizer's groups
            super().add_param_group(param_group)
            return
        group = _named_group(len(self.param_groups), param_group)
        if isinstance(self.inner, LearnedOptimizer):  # what the face records of whole parameters, a group of its own has
            late = self.inner.before_sharding(group["params"], self._given)
            group |= {key: value for key, value in late.items() if key not in self._given}
        known = {id(member.param) for bucket in self.buckets for member in bucket.members}
        for fqn, param in group["params"]:
            if id(param) in known:
                raise ValueError(f"{fqn!r} is already in a parameter group of this optimizer")
        self._check_same_on_all_ranks([group])
        before = len(self.buckets)
        try:
            self.inner.add_param_group(self._shard_group(group))
        except Exception:
            del self.buckets[before:]
            raise
        added = {id(param) for _, param in group["params"]}
        self._frozen = [(fqn, param) for fqn, param in self._frozen if id(param) not in added]
        self._share_groups()
        self._check_same_settings()

    def _share_groups(self) -> None:
        """One list of groups and one state, seen through this object and the inner optimizer."""
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    def _check_same_on_all_ranks(self, groups: list[dict[str, Any]]) -> None:
        named = [(i, fqn, p) for i, group in enumerate(groups) for fqn, p in group["params"]]
        if not named:
            raise ValueError("there is no trainable parameter (requires_grad=True) to optimize")
        for _, fqn, param in named:
            check_param(fqn, param)
        if self.group is not None:
            specs: list[Any] = [f"bucket_cap_mb={self._cap_mb}, reduce_dtype={self._reduce_dtype}"]
            specs += [[fqn, list(p.shape), str(p.dtype), i] for i, fqn, p in named]
            comm.check_equal("parameter", specs, self.group, named[0][2].device)

    def _check_same_settings(self) -> None:
        """Ranks with other weights or hyperparameters would not fail, they would drift apart."""
        if self.group is None:
            return
        settings = [type(self.inner).__name__, self.weights.describe() if self.weights is not None else "no weights"]
        if isinstance(self.inner, LearnedOptimizer):
            settings += self.inner.settings()
        for i, group in enumerate(self.inner.param_groups):
            entries = ((k, v.tolist() if isinstance(v, Tensor) else v) for k, v in sorted(group.items()) if k != "params")
            settings += [f"group {i}: {k}={v}" for k, v in entries]
        comm.check_equal("setting", settings, self.group, self.buckets[0].flat.device)

    def _shard_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group with every parameter replaced by its local piece; its parameters become views of new buckets."""
        pieces: dict[str, nn.Parameter] = {}
        for chunk in self._fill(group["params"]):
            bucket = self._build(chunk)
            self.buckets.append(bucket)
            pieces.update({member.fqn: member.piece for member in bucket.members})
        return {**group, "params": [(fqn, pieces[fqn]) for fqn, _ in group["params"]]}

    def _fill(self, named: list[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
        """Parameters of one dtype and device in chunks of bucket_cap_mb, in reverse: about the order in which backward ends."""
        kinds: dict[tuple[torch.dtype, torch.device], list[tuple[str, Tensor]]] = {}
        for fqn, param in reversed(named):
            kinds.setdefault((param.dtype, param.device), []).append((fqn, param))
        for params in kinds.values():
            chunk: list[tuple[str, Tensor]] = []
            size = 0.0
            for fqn, param in params:
                chunk.append((fqn, param))
                size += param.numel() * param.element_size() / 2**20
                if size >= self._cap_mb:
                    yield chunk
                    chunk, size = [], 0.0
            if chunk:
                yield chunk

    @torch.no_grad()
    def _build(self, named: list[tuple[str, Tensor]]) -> Bucket:
        numel = sum(param.numel() for _, param in named)
        shard_numel = -(-numel // (self.ranks * ALIGNMENT)) * ALIGNMENT
        flat = named[0][1].new_zeros(self.ranks * shard_numel)
        members, offset = [], 0
        for fqn, param in named:
            end = offset + param.numel()
            flat[offset:end].view(param.shape).copy_(param)
            param.data = flat[offset:end].view(param.shape)
            peers = []
            for first in (rank * shard_numel for rank in range(self.ranks)):
                start, stop = (min(max(bound - offset, 0), end - offset) for bound in (first, first + shard_numel))
                peers.append(TensorShard.interval(fqn, tuple(param.shape), start, stop))
            start = offset + peers[self.rank].start
            piece = PieceParameter(flat[start : start + peers[self.rank].numel], param)
            bind_shard(piece, peers, self.rank, self.group)
            members.append(Member(fqn, param, offset, piece))
            offset = end
        if self.group is not None:
            comm.broadcast_from_first(flat, self.group)
        return Bucket(flat, shard_numel, numel, members)

    # ------------------------------------------------------------------------------------------ step

    @torch.no_grad()
    def step(self, closure: Any = None, *, loss: Tensor | None = None) -> Any:
        """Average gradients, take the inner optimizer's step on this rank's shard, bring the parameters back.

        Arguments, result and errors are those of `LearnedOptimizer.step`. When the inner step raises, no parameter has changed.
        """
        if isinstance(closure, Tensor):
            closure, loss = None, closure
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        problem = self._problem()
        if isinstance(self.inner, LearnedOptimizer):
            if problem is not None:
                self.inner.fail_next_step(problem)  # raised in the step, where the other ranks hear of it too
        elif problem is not None:
            raise problem
        for bucket in self.buckets:
            self.reduce_bucket(bucket)
        try:
            if isinstance(self.inner, LearnedOptimizer):
                self.inner.step(loss=loss)
            else:
                self.inner.step()
        finally:  # what is left would be taken for the gradient of the next step
            for bucket in self.buckets:
                bucket.grad = None
                for member in bucket.members:
                    member.piece.grad = None
        for bucket in self.buckets:
            self.gather_bucket(bucket)
        return loss

    def _problem(self) -> ValueError | None:
        """Why this rank cannot take a step, before it enters a collective."""
        for bucket in self.buckets:
            for member in bucket.members:
                param, fqn = member.param, member.fqn
                if param.numel() and param.data_ptr() != bucket.flat[member.offset :].data_ptr():
                    return ValueError(
                        f"the memory of {fqn!r} was replaced after ZeroOptimizer was built (by .to(), .half(), a new tensor); "
                        "build the optimizer after such changes"
                    )
                if param.grad is not None and param.grad.layout != torch.strided:
                    return ValueError(f"{fqn!r} has a sparse gradient: build its embedding with sparse=False")
        for fqn, param in self._frozen:
            if param.requires_grad:
                return ValueError(
                    f"{fqn!r} was frozen when ZeroOptimizer was built and is trainable now; add it on all ranks with "
                    "add_param_group"
                )
        return None

    def extend(self, num_steps: int) -> None:
        """See `VeLO.extend`; call it alike on all ranks."""
        extend = getattr(self.inner, "extend", None)
        if extend is None:
            raise TypeError(f"{type(self.inner).__name__} has no length of run to extend")
        extend(num_steps)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a ZeroOptimizer belongs to its process group and its model's memory; it cannot be copied or pickled")

    def set_loss(self, loss: Tensor | float) -> None:
        """See `LearnedOptimizer.set_loss`."""
        if isinstance(self.inner, LearnedOptimizer):
            self.inner.set_loss(loss)

    @torch.no_grad()
    def reduce_bucket(self, bucket: Bucket) -> None:
        """Average a bucket's gradients over the ranks; this rank keeps its part, as the gradients of its pieces.

        Every rank reduces every bucket in the same order, whichever gradients it has: None counts as zeros.
        """
        dtype = self._reduce_dtype or _at_least_float32(bucket.flat.dtype)
        full = torch.zeros_like(bucket.flat, dtype=dtype)
        for member in bucket.members:
            param, end = member.param, member.offset + member.param.numel()
            binding = bound_shard(member.piece)
            assert binding is not None
            binding.present = param.grad is not None
            if param.grad is not None and param.grad.layout == torch.strided and param.grad.shape == param.shape:
                full[member.offset : end].view(param.shape).copy_(param.grad)
        mine = full
        if self.group is not None:
            mine = full.new_empty(bucket.shard_numel)
            comm.reduce_scatter_mean(mine, full, self.group)
        bucket.grad = mine.to(bucket.flat.dtype)
        low, _ = bucket.bounds(self.rank)
        for member in bucket.members:
            first = member.offset + _shard_of(member.piece).start - low
            member.piece.grad = bucket.grad[first : first + member.piece.numel()] if member.piece.numel() else bucket.grad[:0]

    @torch.no_grad()
    def gather_bucket(self, bucket: Bucket) -> None:
        """Bring every rank's updated part of a bucket to all ranks; the model's parameters are views of it."""
        if self.group is not None:
            low, high = bucket.bounds(self.rank)
            comm.all_gather(bucket.flat, bucket.flat[low:high], self.group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the model's parameters and of this rank's pieces."""
        for bucket in self.buckets:
            bucket.grad = None
            for member in bucket.members:
                member.piece.grad = None
                if set_to_none:
                    member.param.grad = None
                elif member.param.grad is not None:
                    member.param.grad.detach_().zero_()

    # ----------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The state in the keys, shapes and dtypes of the unsharded optimizer, of which this rank has its part; no collective.

        Save it with torch.distributed.checkpoint, or what `pylo_dist.full_state_dict` gathers with torch.save.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state: dict[str, Any] = self.inner.state_dict()
        if not isinstance(self.inner, LearnedOptimizer):
            state = elementwise_state_dict(state, self.param_groups)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state = post_hook(self, state) or state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the same optimizer, saved in any layout on any number of ranks.

        Args:
            state_dict: as `LearnedOptimizer.load_state_dict`.

        Raises:
            ValueError: state that does not fit, by key or parameter; nothing has been changed then.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        if not isinstance(self.inner, LearnedOptimizer):
            state_dict = elementwise_local_state(state_dict, self.param_groups)
        self.inner.load_state_dict(state_dict)
        self._share_groups()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise the ValueError that `load_state_dict` would raise; changes nothing."""
        if isinstance(self.inner, LearnedOptimizer):
            self.inner.check_state_dict(state_dict)
        else:
            elementwise_local_state(state_dict, self.param_groups)

    # ----------------------------------------------------------------------------------------- views

    @property
    def weights(self) -> Any:
        """The learned weights of the inner optimizer; None for torch's."""
        return getattr(self.inner, "weights", None)

    @property
    def grad_norm(self) -> Tensor:
        """See `LearnedOptimizer.grad_norm`."""
        if not isinstance(self.inner, LearnedOptimizer):
            raise TypeError(f"{type(self.inner).__name__} keeps no gradient norm")
        return self.inner.grad_norm

    def stats(self) -> dict[str, dict[str, Tensor]]:
        """See `LearnedOptimizer.stats`; empty for torch's optimizers."""
        return self.inner.stats() if isinstance(self.inner, LearnedOptimizer) else {}

    def report(self) -> Report:
        """The inner optimizer's report, with how evenly the work is dealt (`work_max_over_mean`, over all ranks)."""
        if isinstance(self.inner, LearnedOptimizer):
            report = self.inner.report()
        else:
            name = type(self.inner).__name__
            rows = [
                report_row(shard, piece.dtype, name, self.state.get(piece, {}), self.ranks)
                for piece, shard in ((m.piece, _shard_of(m.piece)) for bucket in self.buckets for m in bucket.members)
            ]
            report = Report(rows, [name], {"parameters": len(rows), "numel": sum(row["numel"] for row in rows)})
        work = [sum(bucket.elements_of(rank) for bucket in self.buckets) for rank in range(self.ranks)]
        report.heading.append(f"ZeRO-1, rank {self.rank} of {self.ranks}, {len(self.buckets)} buckets")
        report.totals["work_max_over_mean"] = max(work) * len(work) / max(1, sum(work))
        return report


def _frozen_params(model_or_params: Any) -> list[tuple[str, Tensor]]:
    """Parameters of a module that are not optimized because they are frozen now."""
    if not isinstance(model_or_params, nn.Module):
        return []
    return [(fqn, p) for fqn, p in model_or_params.named_parameters() if not p.requires_grad]


def _as_groups(model_or_params: nn.Module | Iterable[Any]) -> list[dict[str, Any]]:
    if isinstance(model_or_params, nn.Module):
        return [{"params": [(fqn, p) for fqn, p in model_or_params.named_parameters() if p.requires_grad]}]
    entries = list(model_or_params)
    if not entries:
        raise ValueError("optimizer got an empty parameter list")
    return entries if isinstance(entries[0], dict) else [{"params": entries}]


def _named_group(i: int, group: dict[str, Any]) -> dict[str, Any]:
    """The group with its trainable parameters as (fqn, tensor) pairs."""
    entries = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    named = [entry if isinstance(entry, tuple) else (f"group{i}.{j}", entry) for j, entry in enumerate(entries)]
    seen: set[int] = set()
    for fqn, param in named:
        if id(param) in seen:
            raise ValueError(f"{fqn!r} is in the same group twice; list a tied parameter once")
        seen.add(id(param))
    return {**group, "params": [(fqn, param) for fqn, param in named if param.requires_grad]}


def _shard_of(piece: Tensor) -> TensorShard:
    binding = bound_shard(piece)
    assert binding is not None
    return binding.shard


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype

"""ZeRO over torch.distributed: gradients are reduce-scattered, each rank steps on its shard,
parameters are all-gathered.

The optimizer users see, and the order of things in a step; memory is in `buckets`, gradients in
`reduction`, parameters in `gathering`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ... import comm
from ...layouts.plain import check_param, is_dtensor
from ...optimizer import LearnedOptimizer
from ...optimizer.report import Report, group_settings, report_row
from ...optimizer.sharded_state import (
    MASTER,
    element_part,
    element_state,
    elementwise_local_state,
    elementwise_state_dict,
)
from .buckets import Bucket, Member, Sharing, build, fill, release
from .gathering import ParameterGatherer
from .reduction import GradientReducer

T = TypeVar("T")

# Optimizers of torch whose update of an element depends on that element alone; any other would be
# silently wrong on a shard.
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


class ZeroOptimizer(torch.optim.Optimizer):
    """Any learned optimizer (or elementwise optimizer of torch) with gradients, state and step
    sharded over ranks.

    The step equals that of one process to the layout tolerance: cuts fall anywhere, and every
    whole-tensor quantity is summed over the ranks. At construction rank 0's parameters are given to
    all ranks, as DDP does. Gradients are averaged over ranks.

    `param_groups` hold this rank's 1-D pieces and their averaged gradients, from the end of
    backward on. That is where to scale or clip them: look at `param_groups` then; a list of pieces
    kept from before does not tell the optimizer that something changed. `step()` drops the pieces'
    gradients; `zero_grad()` drops those of the parameters too. A step that is skipped needs this
    optimizer's `zero_grad()`: that of the model knows nothing of the pieces, where under stage 2
    the gradients are.

    Every rank must run the same backward passes, each with a gradient for some parameter; which
    ones may differ. Between them and `step()` other collectives are free.

    Args:
        model_or_params: a module (all its trainable parameters), or what optimizers take:
            parameters, groups, named parameters. Given a module, parameters of eager modules arrive
            during the next forward pass.
        optimizer_class: e.g. `pylo_dist.AdafacLO`; or torch.optim's AdamW and its like. A parameter
            without gradient on any rank is passed over by learned optimizers; torch's see a
            gradient of zeros.
        stage: 1: full gradients stay on the parameters until `zero_grad()`, and those of several
            backward passes add up there. 2: they are freed as they are averaged, and add up in the
            shard.
        process_group: the ranks that share the parameters; None: the world, or a single rank where
            torch.distributed is not initialised.
        replicate_group: ranks that hold the same part of other replicas, as in HSDP; gradients are
        averaged over them too. bucket_cap_mb: a bucket is closed when it reaches this size; a
        parameter is never split over two.
        reduce_dtype: dtype in which gradients are averaged; None: the parameter's, float32 for
        bfloat16 and float16. overlap: send gradients while backward goes on, and wait for
        parameters only where they are read (TorchScript and captured CUDA graphs read them unseen:
        leave overlap out there). Without it gradients leave at the step or the first look at
        `param_groups`, alike on all ranks, so that those on the parameters may still be changed
        after backward (stage 1).
        master_weights: step on a float32 copy of this rank's part of bfloat16 and float16
            parameters.
        check_replicas_every: compare the replicated state of all ranks bit by bit every so many
            steps; None: never.
        timeout: seconds a rank waits for the others in a collective of the optimizer before it
            raises CommunicationError, on CPUs; None, and on GPUs: what the process group was made
            with.
        **optimizer_kwargs: for `optimizer_class`.

    Raises:
        ValueError: a setting or parameter that cannot be served, or a model that is not the same on
        every rank (on all ranks). PeerError: another rank could not build its optimizer.
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
        overlap: bool = True,
        master_weights: bool = True,
        check_replicas_every: int | None = None,
        timeout: float | None = None,
        **optimizer_kwargs: Any,
    ) -> None:
        self._built = False
        self.stage = stage
        self.sharing = _sharing(process_group, replicate_group)
        self.buckets: list[Bucket] = []
        self._cap_mb, self._reduce_dtype, self._timeout = bucket_cap_mb, reduce_dtype, timeout
        self._overlap, self._master_weights = overlap, master_weights
        self._check_every, self._steps = check_replicas_every, 0
        self._given = dict(optimizer_kwargs)
        self._frozen = _frozen_params(model_or_params)
        self._registered = _registered_params(model_or_params)

        def prepare() -> tuple[list[dict[str, Any]], dict[str, Any]]:
            self._check_arguments(optimizer_class)
            groups = [_named_group(i, group) for i, group in enumerate(_as_groups(model_or_params))]
            _check_params(groups)
            if not issubclass(optimizer_class, LearnedOptimizer):
                return groups, optimizer_kwargs
            named = [pair for group in groups for pair in group["params"]]
            return groups, optimizer_class.before_sharding(named, optimizer_kwargs)

        groups, kwargs = comm.together(prepare, self.sharing.holders)
        self._check_same_on_all_ranks(groups)
        self.inner = self._on_new_buckets(
            lambda: optimizer_class([self._shard_group(group) for group in groups], **kwargs)
        )
        self._check_same_settings()
        # the loss is averaged over the ranks that share the parameters
        if isinstance(self.inner, LearnedOptimizer):
            self.inner.process_group = (
                False if self.sharing.holders is None else self.sharing.holders
            )
            self.inner.timeout = timeout
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self.state = self.inner.state
        self._reducer = GradientReducer(
            self.buckets,
            self.sharing,
            frees=stage == 2,
            overlap=overlap,
            dtype=reduce_dtype,
            timeout=timeout,
            landed=self._landed,
        )
        self._gatherer = ParameterGatherer(
            self.buckets, self.sharing, overlap=overlap, timeout=timeout
        )
        self._reducer.add(0)
        if isinstance(model_or_params, nn.Module):
            self._gatherer.watch(model_or_params)
        self._share_first_values(self.buckets)
        self._built = True

    # --------------------------------------------------------------------------------------- groups

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups: this rank's pieces and, once backward has run, their
        averaged gradients.
        """
        if self._built:
            self._reducer.flush()
            if self._reducer.spread_nonfinite() and isinstance(self.inner, LearnedOptimizer):
                # whoever looks may change them, not always in a way that leaves a trace
                self.inner.early.forget()
            return self.inner.param_groups
        return cast("list[dict[str, Any]]", self.__dict__.get("_groups", []))

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._built:  # torch replaces the list when it loads a state
            self.inner.param_groups = groups
        else:
            self.__dict__["_groups"] = groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Shard more parameters; all ranks must add the same ones."""
        if not self._built:  # called by torch's constructor for the inner optimizer's groups
            super().add_param_group(param_group)
            return
        before = len(self.buckets)

        def prepare() -> dict[str, Any]:
            group = _named_group(len(self.inner.param_groups), param_group)
            # what the face records of whole parameters, a group of its own has
            if isinstance(self.inner, LearnedOptimizer):
                late = self.inner.before_sharding(group["params"], self._given)
                group |= {key: value for key, value in late.items() if key not in self._given}
            known = {id(member.param) for bucket in self.buckets for member in bucket.members}
            for fqn, param in group["params"]:
                if id(param) in known:
                    raise ValueError(f"{fqn!r} is already in a parameter group of this optimizer")
            _check_params([group])
            return group

        group = comm.together(prepare, self.sharing.holders)
        self._check_same_on_all_ranks([group])
        self._reducer.flush()
        self._gatherer.wait()
        self._on_new_buckets(lambda: self.inner.add_param_group(self._shard_group(group)))
        self._reducer.add(before)
        added = {id(param) for _, param in group["params"]}
        self._frozen = [(fqn, param) for fqn, param in self._frozen if id(param) not in added]
        self._check_same_settings()
        self._share_first_values(self.buckets[before:])

    def _check_arguments(self, optimizer_class: type[torch.optim.Optimizer]) -> None:
        if self.stage not in (1, 2):
            raise ValueError(
                f"stage={self.stage!r}: wanted 1 or 2; for sharded parameters use FSDP2"
            )
        if not self._cap_mb > 0:
            raise ValueError(f"bucket_cap_mb={self._cap_mb!r}: wanted a number > 0")
        if self._reduce_dtype is not None and not self._reduce_dtype.is_floating_point:
            raise ValueError(
                f"reduce_dtype={self._reduce_dtype}: wanted a floating-point dtype or None"
            )
        if self._check_every is not None and not self._check_every > 0:
            raise ValueError(
                f"check_replicas_every={self._check_every!r}: wanted a number of steps > 0, or None"
            )
        if self._timeout is not None and not self._timeout > 0:
            raise ValueError(f"timeout={self._timeout!r}: wanted seconds > 0, or None")
        if not issubclass(optimizer_class, LearnedOptimizer) and optimizer_class not in ELEMENTWISE:
            known = ", ".join(c.__name__ for c in ELEMENTWISE)
            raise ValueError(
                f"{optimizer_class.__name__} may read whole tensors and would be silently wrong on "
                f"shards; wanted a learned optimizer of pylo_dist or one of {known}"
            )

    def _check_same_on_all_ranks(self, groups: list[dict[str, Any]]) -> None:
        if self.sharing.holders is None:
            return
        named = [(i, fqn, p) for i, group in enumerate(groups) for fqn, p in group["params"]]
        own = (
            self._cap_mb,
            self._reduce_dtype,
            self.stage,
            self._overlap,
            self._master_weights,
            self._check_every,
        )
        names = (
            "bucket_cap_mb",
            "reduce_dtype",
            "stage",
            "overlap",
            "master_weights",
            "check_replicas_every",
        )
        specs: list[Any] = [
            ", ".join(f"{name}={value}" for name, value in zip(names, own, strict=True))
        ]
        specs += [[fqn, list(p.shape), str(p.dtype), i] for i, fqn, p in named]
        comm.check_equal("parameter", specs, self.sharing.holders, named[0][2].device)

    def _check_same_settings(self) -> None:
        """Ranks with other weights or hyperparameters would not fail, they would drift apart."""
        if self.sharing.holders is None:
            return
        if isinstance(self.inner, LearnedOptimizer):
            settings = self.inner.settings()
        else:
            settings = [type(self.inner).__name__, *group_settings(self.inner.param_groups)]
        comm.check_equal("setting", settings, self.sharing.holders, self.buckets[0].flat.device)

    def _shard_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group with every parameter replaced by its local piece; its parameters become views
        of new buckets.
        """
        pieces: dict[str, nn.Parameter] = {}
        for chunk in fill(group["params"], self._cap_mb):
            bucket = build(chunk, self.sharing, self._master_weights)
            self.buckets.append(bucket)
            pieces.update({member.fqn: member.piece for member in bucket.members})
        return {**group, "params": [(fqn, pieces[fqn]) for fqn, _ in group["params"]]}

    def _on_new_buckets(self, work: Callable[[], T]) -> T:
        """`work()`, which makes buckets, alike on all ranks; where it fails they are given up, and
        the error reaches all.
        """
        before = len(self.buckets)

        def attempt() -> T:
            try:
                return work()
            except Exception:
                release(self.buckets[before:])
                del self.buckets[before:]
                raise

        return comm.together(attempt, self.sharing.holders)

    @torch.no_grad()
    def _share_first_values(self, buckets: list[Bucket]) -> None:
        """Give the first rank's parameters to all."""
        for bucket in buckets:
            if self.sharing.group is not None:
                comm.broadcast(bucket.flat, 0, self.sharing.group)
            if self.sharing.replicate_group is not None:
                comm.broadcast(bucket.flat, 0, self.sharing.replicate_group)
            bucket.refresh_master()

    # ----------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Any = None, *, loss: Tensor | None = None) -> Any:
        """Average gradients, take the inner optimizer's step on this rank's shard, bring the
        parameters back.

        Arguments, result and errors are those of `LearnedOptimizer.step`. When the inner step
        raises, no parameter has changed.
        """
        if isinstance(closure, Tensor):
            closure, loss = None, closure
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._gatherer.wait()
        self._reducer.finish()
        problem = self._problem()
        if problem is not None and isinstance(self.inner, LearnedOptimizer):
            # raised in the step, where the other ranks hear of it too
            self.inner.fail_next_step(problem)
            problem = None
        for bucket in self.buckets:
            bucket.refresh_master()
        try:
            if isinstance(self.inner, LearnedOptimizer):
                self.inner.step(loss=loss)
            else:
                self._raise_alike(problem)
                self.inner.step()
        finally:  # what is left would be taken for the gradient of the next step
            self._forget_gradients()
        for bucket in self.buckets:
            bucket.write_back()
        self._gatherer.start()
        self._steps += 1
        if self._check_every is not None and self._steps % self._check_every == 0:
            self.check_replicas()
        return loss

    def _raise_alike(self, problem: ValueError | None) -> None:
        """Raise `problem` here and a PeerError on the other ranks, where the inner optimizer
        cannot; waits for the device.
        """
        if self.sharing.holders is None:
            if problem is not None:
                raise problem
            return
        failed = torch.tensor([float(problem is not None)], device=self.buckets[0].flat.device)
        comm.all_reduce(
            failed, self.sharing.holders, "the agreement on a step", self._timeout
        ).wait()
        if problem is not None:
            raise problem
        if float(failed):
            raise comm.PeerError

    def reduce_gradients(self) -> None:
        """Average the gradients that are on the parameters now, for code that reads `param_groups`
        after setting them by hand.

        Collective. After `backward()` it is not needed.
        """
        self._reducer.finish()

    def no_sync(self) -> AbstractContextManager[None]:
        """A context for all backward passes of a step but the last: gradients add up on this rank,
        nothing is sent.
        """
        return self._reducer.no_sync()

    def _landed(self, bucket: Bucket) -> None:
        """A bucket's averaged gradient has arrived: the part of the step that reads gradients alone
        may begin.
        """
        if isinstance(self.inner, LearnedOptimizer) and self._overlap:
            self.inner.early.arrived(member.piece for member in bucket.members)

    def _forget_gradients(self) -> None:
        self._reducer.forget()
        if isinstance(self.inner, LearnedOptimizer):
            self.inner.early.forget()

    def _problem(self) -> ValueError | None:
        """Why this rank cannot take a step."""
        for bucket in self.buckets:
            for member in bucket.members:
                param, fqn = member.param, member.fqn
                if param.numel() and param.data_ptr() != bucket.flat[member.offset :].data_ptr():
                    return ValueError(
                        f"the memory of {fqn!r} was replaced after ZeroOptimizer was built (by "
                        ".to(), .half(), a new tensor); build the optimizer after such changes"
                    )
        for module, name, param in self._registered:
            if module._parameters.get(name) is not param:
                return ValueError(
                    f"{type(module).__name__}.{name} is another parameter than when ZeroOptimizer "
                    "was built (assigned, or by load_state_dict(assign=True)), which it would not "
                    "update; load in place, or build the optimizer after it"
                )
        for fqn, param in self._frozen:
            if param.requires_grad:
                return ValueError(
                    f"{fqn!r} was frozen when ZeroOptimizer was built and is trainable now; add it "
                    "on all ranks with add_param_group"
                )
        return self._reducer.problem

    def check_replicas(self) -> None:
        """Compare the replicated state (factors, LSTM rows, run-global values) of all ranks bit by
        bit. Collective.

        Raises:
            RuntimeError: on all ranks, naming what differs.
        """
        if self.sharing.holders is None or not isinstance(self.inner, LearnedOptimizer):
            return
        names, tensors = [], []
        for bucket in self.buckets:
            for member in bucket.members:
                for name, field in self.inner.state_fields(member.piece).items():
                    if field.replicated is not None and self.state[member.piece]:
                        names.append(f"{name!r} of {member.fqn!r}")
                        tensors.append(self.state[member.piece][name])
        for i, group in enumerate(self.inner.param_groups):
            for key in ("step", *self.inner.rule.group_state()):
                names.append(f"{key!r} of group {i}")
                tensors.append(group[key])
        different = comm.differing(comm.checksums(tensors), self.sharing.holders)
        if different:
            raise RuntimeError(
                f"replicated state differs between ranks after {self._steps} steps: "
                f"{', '.join(names[i] for i in different[:5])}; some rank computes differently "
                "(hardware fault, another library): go back to the last checkpoint"
            )

    def extend(self, num_steps: int) -> None:
        """See `VeLO.extend`; call it alike on all ranks."""
        extend = getattr(self.inner, "extend", None)
        if extend is None:
            raise TypeError(f"{type(self.inner).__name__} has no length of run to extend")
        extend(num_steps)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a ZeroOptimizer belongs to its process group and its model's memory; it cannot be "
            "copied or pickled"
        )

    def set_loss(self, loss: Tensor | float) -> None:
        """See `LearnedOptimizer.set_loss`."""
        if isinstance(self.inner, LearnedOptimizer):
            self.inner.set_loss(loss)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the model's parameters and of this rank's pieces."""
        self._forget_gradients()
        for bucket in self.buckets:
            for member in bucket.members:
                if set_to_none:
                    member.param.grad = None
                elif member.param.grad is not None:
                    member.param.grad.detach_().zero_()

    # ---------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The state in the keys, shapes and dtypes of the unsharded optimizer, of which this rank
        has its part; no collective.

        Save it with torch.distributed.checkpoint, or what `pylo_dist.full_state_dict` gathers with
        torch.save.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state: dict[str, Any] = self.inner.state_dict()
        if not isinstance(self.inner, LearnedOptimizer):
            state = elementwise_state_dict(state, self.inner.param_groups)
        for i, member, _ in self._masters(state["param_groups"]):
            state["state"].setdefault(i, {})[MASTER] = element_state(
                MASTER, member.piece.detach(), member.piece
            )
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
        self.check_state_dict(state_dict)
        loaded = _without_masters(state_dict)
        if not isinstance(self.inner, LearnedOptimizer):
            loaded = elementwise_local_state(loaded, self.inner.param_groups)
        self.inner.load_state_dict(loaded)
        self.state = self.inner.state
        for i, member, bucket in self._masters(state_dict["param_groups"]):
            master = state_dict["state"].get(i, {}).get(MASTER)
            if master is not None:
                member.piece.data.copy_(element_part(MASTER, master, member.piece))
            elif bucket.master is not None:
                # saved without masters: what the parameter holds is all there is
                member.piece.data.copy_(bucket.piece_of(member, bucket.shard))
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _masters(self, groups: list[dict[str, Any]]) -> Iterator[tuple[Any, Member, Bucket]]:
        """Every parameter that has a master, with its id in the groups of a state."""
        place = {
            id(member.piece): (member, bucket)
            for bucket in self.buckets
            for member in bucket.members
        }
        for saved_group, group in zip(groups, self.inner.param_groups, strict=True):
            for saved, piece in zip(saved_group["params"], group["params"], strict=True):
                member, bucket = place[id(piece)]
                if bucket.master is not None and member.param.numel():
                    yield saved, member, bucket

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise the ValueError that `load_state_dict` would raise; changes nothing."""
        if isinstance(self.inner, LearnedOptimizer):
            self.inner.check_state_dict(state_dict)
        else:
            elementwise_local_state(_without_masters(state_dict), self.inner.param_groups)
        for i, member, _ in self._masters(state_dict["param_groups"]):
            master = state_dict["state"].get(i, {}).get(MASTER)
            if master is not None:
                element_part(MASTER, master, member.piece)

    # ---------------------------------------------------------------------------------------- views

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
        """The inner optimizer's report, with how evenly the work is dealt (`work_max_over_mean`,
        over all ranks).
        """
        if isinstance(self.inner, LearnedOptimizer):
            report = self.inner.report()
        else:
            name = type(self.inner).__name__
            rows = [
                report_row(
                    m.shard, m.param.dtype, name, self.state.get(m.piece, {}), self.sharing.ranks
                )
                for bucket in self.buckets
                for m in bucket.members
            ]
            report = Report(
                rows, [name], {"parameters": len(rows), "numel": sum(row["numel"] for row in rows)}
            )
        share = self.sharing
        work = [
            sum(bucket.elements_of(rank) for bucket in self.buckets) for rank in range(share.ranks)
        ]
        report.heading.append(
            f"ZeRO-{self.stage}, rank {share.rank} of {share.ranks}, {len(self.buckets)} buckets"
        )
        if share.replicas > 1:
            report.heading.append(
                f"{share.replicas} replicas: each element is stepped and its state kept "
                f"{share.replicas} times"
            )
        report.totals["master_bytes"] = sum(
            4 * bucket.shard_numel for bucket in self.buckets if bucket.master is not None
        )
        report.totals["work_max_over_mean"] = max(work) * len(work) / max(1, sum(work))
        return report


def _without_masters(state_dict: dict[str, Any]) -> dict[str, Any]:
    state = {
        i: {name: t for name, t in entries.items() if name != MASTER}
        for i, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _frozen_params(model_or_params: Any) -> list[tuple[str, Tensor]]:
    """Parameters of a module that are not optimized because they are frozen now."""
    if not isinstance(model_or_params, nn.Module):
        return []
    return [(fqn, p) for fqn, p in model_or_params.named_parameters() if not p.requires_grad]


def _registered_params(model_or_params: Any) -> list[tuple[nn.Module, str, Tensor]]:
    """Where a module keeps its parameters."""
    modules = model_or_params.modules() if isinstance(model_or_params, nn.Module) else ()
    return [
        (module, name, p)
        for module in modules
        for name, p in module._parameters.items()
        if p is not None
    ]


def _as_groups(model_or_params: nn.Module | Iterable[Any]) -> list[dict[str, Any]]:
    if isinstance(model_or_params, nn.Module):
        return [
            {
                "params": [
                    (fqn, p) for fqn, p in model_or_params.named_parameters() if p.requires_grad
                ]
            }
        ]
    entries = list(model_or_params)
    if not entries:
        raise ValueError("optimizer got an empty parameter list")
    return entries if isinstance(entries[0], dict) else [{"params": entries}]


def _named_group(i: int, group: dict[str, Any]) -> dict[str, Any]:
    """The group with its trainable parameters as (fqn, tensor) pairs."""
    entries = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    named = [
        entry if isinstance(entry, tuple) else (f"group{i}.{j}", entry)
        for j, entry in enumerate(entries)
    ]
    seen: set[int] = set()
    for fqn, param in named:
        if id(param) in seen:
            raise ValueError(f"{fqn!r} is in the same group twice; list a tied parameter once")
        seen.add(id(param))
    return {**group, "params": [(fqn, param) for fqn, param in named if param.requires_grad]}


def _check_params(groups: list[dict[str, Any]]) -> None:
    named = [pair for group in groups for pair in group["params"]]
    if not named:
        raise ValueError("there is no trainable parameter (requires_grad=True) to optimize")
    for fqn, param in named:
        check_param(fqn, param)
        if is_dtensor(param):
            raise ValueError(
                f"{fqn!r} is a DTensor (fully_shard, tensor parallelism), which is sharded "
                "already: give the parameters to the optimizer itself; ZeroOptimizer shards whole "
                "parameters"
            )


def _sharing(process_group: Any, replicate_group: Any) -> Sharing:
    group = comm.default_group() if process_group is None else (process_group or None)
    # a single rank holds everything: nothing to communicate
    alone = group if comm.size(group) > 1 else None
    rank, ranks = comm.rank(group), comm.size(group)
    if replicate_group is None:
        return Sharing(alone, rank, ranks, None, alone)
    if process_group is None or group is None:
        raise ValueError(
            "replicate_group without process_group: wanted the ranks that share the parameters of "
            "one replica, too"
        )
    if comm.size(replicate_group) == 1:
        return Sharing(alone, rank, ranks, None, alone)
    return Sharing(
        alone,
        rank,
        ranks,
        replicate_group,
        comm.union(group, replicate_group),
        comm.size(replicate_group),
    )

"""ZeRO over torch.distributed: gradients are reduce-scattered, each rank steps on its shard,
parameters are all-gathered.

The optimizer users see, and the order of things in a step. Memory is in `buckets`, gradients in
`reduction`, parameters in `gathering`, the optimizer that steps on the shard in `inner`, what ranks
must agree on in `sharing`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ... import comm
from ...core import trace
from ...core.devices import stream_of
from ...core.pieces import raw_grad, set_raw_grad
from ...core.scalars import as_python, with_python_numbers
from ...optimizer.callbacks import evaluate, with_hooks
from ...optimizer.loading import matched
from ...optimizer.report import Report
from .buckets import Bucket, add_together, default_cap_mb, shard_group, share_first_values
from .freed import FreedGradient
from .gathering import ParameterGatherer
from .groups import check_params, named_group, named_groups, take_frozen
from .inner import Inner, kind_of
from .masters import add_masters, check_masters, load_masters, without_masters
from .others import inside_ddp
from .reduction import GradientReducer
from .sharing import (
    Settings,
    Sharing,
    check_same_parameters,
    check_same_settings,
    check_same_state,
)
from .watch import ModelWatch


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
    ones may differ. With overlap gradients have process groups of their own, made at construction:
    other ZeroOptimizers, DDP and collectives of yours may send in the same pass, in any order.

    Args:
        model_or_params: a module (all its trainable parameters), or what optimizers take:
            parameters, groups, named parameters. Given a module, parameters of eager modules arrive
            during the next forward pass. Given a DistributedDataParallel, which averages gradients
            by itself, they leave in the step, after that (stage 1 alone).
        optimizer_class: e.g. `pylo_dist.AdafacLO`; or torch.optim's AdamW and its like. A parameter
            without gradient on any rank is passed over by learned optimizers; torch's see a
            gradient of zeros.
        module: of groups or parameters the module that owns them all: their parameters arrive
            during its next forward pass, and have its names where they are given without.
        stage: 1: full gradients stay on the parameters until `zero_grad()`, and those of several
            backward passes add up there. 2: they are freed as they are averaged, and add up in the
            shard.
        process_group: the ranks that share the parameters; None: the world, or a single rank where
            torch.distributed is not initialised and no launcher has started others; False: this
            rank alone.
        replicate_group: ranks that hold the same part of other replicas, as in HSDP; gradients are
            averaged over them too.
        bucket_cap_mb: a bucket is closed when it reaches this size in MB of parameters; one that is
            twice as large, by a large parameter, travels in slices of about this size. None: 25 up
            to 50 ranks, and more on more of them, see `report()`.
        reduce_dtype: dtype in which gradients are averaged; None: the parameter's, float32 for
            bfloat16 and float16.
        overlap: send gradients while backward goes on, and wait for parameters only where they are
            read (TorchScript and captured CUDA graphs read them unseen: leave overlap out there).
            Without it gradients leave at the step or the first look at `param_groups`, alike on all
            ranks, so that those on the parameters may still be changed after backward (stage 1).
        master_weights: step on a float32 copy of this rank's part of bfloat16 and float16
            parameters.
        check_replicas_every: compare the replicated state of all ranks bit by bit every so many
            steps; None: never.
        timeout: seconds a rank waits for the others in a collective of the optimizer before it
            raises CommunicationError, on CPUs; None, and on GPUs: what the process group was made
            with.
        **optimizer_kwargs: for `optimizer_class`.

    Attributes:
        inner: the optimizer of `optimizer_class` over this rank's pieces.
        buckets: the parameters' memory, in the order in which gradients are reduced.
        sharing: the ranks that share it.
        stage: as given.

    Raises:
        ValueError: a setting or parameter that cannot be served, or a model that is not the same on
            every rank (on all ranks).
        PeerError: another rank could not build its optimizer.
    """

    profile_hook_step = staticmethod(with_hooks)  # by which torch gives a class its `step`

    @comm.during("the construction of ZeroOptimizer")
    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        optimizer_class: type[torch.optim.Optimizer],
        *,
        module: nn.Module | None = None,
        stage: int = 1,
        process_group: Any = None,
        replicate_group: Any = None,
        bucket_cap_mb: float | None = None,
        reduce_dtype: torch.dtype | None = None,
        overlap: bool = True,
        master_weights: bool = True,
        check_replicas_every: int | None = None,
        timeout: float | None = None,
        **optimizer_kwargs: Any,
    ) -> None:
        self._built = False
        self.stage = stage = as_python(stage)
        given, model_or_params = model_or_params, inside_ddp(model_or_params)
        # what DDP averages leaves after it, in the step
        overlap_backward = given is model_or_params and overlap
        watched = model_or_params if isinstance(model_or_params, nn.Module) else inside_ddp(module)
        self.sharing = Sharing.of(process_group, replicate_group)
        self.buckets: list[Bucket] = []
        optimizer_kwargs = with_python_numbers(optimizer_kwargs)
        self._given = dict(optimizer_kwargs)
        self._num_steps = 0
        self._problem: Exception | None = None
        self.closures_apart = given is model_or_params  # DDP sends in the same groups

        def prepare() -> tuple[Settings, type[Inner], list[dict[str, Any]], dict[str, Any]]:
            settings = Settings(
                bucket_cap_mb=as_python(bucket_cap_mb),
                reduce_dtype=reduce_dtype,
                stage=stage,
                overlap=overlap,
                master_weights=master_weights,
                check_replicas_every=as_python(check_replicas_every),
                timeout=as_python(timeout),
            )
            if given is not model_or_params and stage != 1:
                raise ValueError(
                    f"stage={stage}: DistributedDataParallel keeps and averages whole gradients, "
                    "so that stage 2 cannot free them; give ZeroOptimizer the module inside and "
                    "train that without DDP, or stage=1"
                )
            groups = named_groups(model_or_params, inside_ddp(module))
            kind = kind_of(optimizer_class)
            check_params(groups)
            named = [pair for group in groups for pair in group["params"]]
            kwargs = kind.before_sharding(optimizer_class, named, optimizer_kwargs)
            return settings, kind, groups, kwargs

        self._settings, kind, groups, kwargs = comm.together(prepare, self.sharing.holders)
        frozen = take_frozen(groups)
        check_same_parameters(groups, self._settings, self.sharing)
        self._cap_mb = self._settings.bucket_cap_mb or default_cap_mb(
            sum(p.nbytes for group in groups for _, p in group["params"]) / 2**20,
            self.sharing.ranks,
        )
        self._sharded = partial(
            shard_group,
            buckets=self.buckets,
            sharing=self.sharing,
            cap_mb=self._cap_mb,
            with_master=master_weights,
        )
        self.inner = add_together(
            lambda: optimizer_class([self._sharded(group) for group in groups], **kwargs),
            self.buckets,
            self.sharing,
        )
        self._inner: Inner = kind(self.inner, self.buckets, self.sharing, timeout)
        check_same_settings(self._inner.settings, self.sharing, self.buckets[0].flat.device)
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self.state = self.inner.state
        self._watch = ModelWatch(model_or_params, self.buckets, frozen)
        # on a CPU, which queues nothing, pass A would take backward's time, and in more calls
        queued = any(stream_of(bucket.flat.device) is not None for bucket in self.buckets)
        self._reducer = GradientReducer(
            self.buckets,
            self.sharing,
            frees=stage == 2,
            overlap=overlap_backward,
            dtype=reduce_dtype,
            timeout=timeout,
            landed=self._inner.gradients_arrived if overlap_backward and queued else None,
        )
        self._gatherer = ParameterGatherer(
            self.buckets, self.sharing, overlap=overlap, timeout=timeout
        )
        self._reducer.add(0)
        if watched is not None:
            self._gatherer.watch(watched)
        share_first_values(self.buckets, self.sharing)
        self._built = True

    # --------------------------------------------------------------------------------------- groups

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups: this rank's pieces and, once backward has run, their
        averaged gradients.
        """
        if self._built:
            self._reducer.flush()
            if self._reducer.nonfinite.spread():
                # whoever looks may change them, not always in a way that leaves a trace
                self._inner.forget_gradients()
                if self._inner.scaling is not None:
                    self._inner.scaling.look()
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
            group = named_group(len(self.inner.param_groups), param_group)
            # what the face records of whole parameters, a group of its own has
            late = self._inner.before_sharding(type(self.inner), group["params"], self._given)
            group |= {key: value for key, value in late.items() if key not in self._given}
            known = {id(member.param) for bucket in self.buckets for member in bucket.members}
            for fqn, param in group["params"]:
                if id(param) in known:
                    raise ValueError(f"{fqn!r} is already in a parameter group of this optimizer")
            if group["params"]:
                check_params([group])
            return group

        group = comm.together(prepare, self.sharing.holders)
        frozen = take_frozen([group])
        device = self.buckets[0].flat.device
        check_same_parameters([group], self._settings, self.sharing, device)
        self._reducer.flush()
        self._gatherer.wait()
        add_together(
            lambda: self.inner.add_param_group(self._sharded(group)), self.buckets, self.sharing
        )
        self._reducer.add(before)
        self._watch.added(group["params"], frozen)
        check_same_settings(self._inner.settings, self.sharing, self.buckets[0].flat.device)
        share_first_values(self.buckets[before:], self.sharing)

    # ----------------------------------------------------------------------------------------- step

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Any = None, *, loss: Tensor | float | None = None) -> Any:
        """Average gradients, take the inner optimizer's step on this rank's shard, bring the
        parameters back.

        Arguments, result and errors are those of `LearnedOptimizer.step`. When the inner step
        raises, no parameter has changed. What a closure raises on one rank is a PeerError on the
        others (but with a DistributedDataParallel in it).
        """
        if closure is not None and not callable(closure):
            closure, loss = None, closure
        problem, self._problem = self._problem, None
        if closure is not None:
            loss, failed = evaluate(closure)
            if failed is not None and not self.closures_apart:
                raise failed
            problem = problem or failed
        self._gatherer.wait()
        self._reducer.finish()
        if self._inner.scaling is not None and self._reducer.nonfinite.unseen:
            self._inner.scaling.forget()
        problem = problem or self._watch.problem() or self._reducer.problem
        for bucket in self.buckets:
            bucket.refresh_master()
        try:
            with trace.phase("step: inner"):
                self._inner.step(loss, problem)
        finally:  # what is left would be taken for the gradient of the next step
            self._forget_gradients()
        for bucket in self.buckets:
            bucket.write_back()
        self._gatherer.start()
        self._num_steps += 1
        every = self._settings.check_replicas_every
        if every is not None and self._num_steps % every == 0:
            self.check_replicas()
        return loss

    def fail_next_step(self, problem: Exception) -> None:
        """See `LearnedOptimizer.fail_next_step`."""
        self._problem = self._problem or problem

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

    @_disable_dynamo
    def set_loss(self, loss: Tensor | float) -> None:
        """See `LearnedOptimizer.set_loss`."""
        self._inner.set_loss(loss)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the model's parameters and of this rank's pieces."""
        self._forget_gradients()
        params = [member.param for bucket in self.buckets for member in bucket.members]
        # parameters on their way are asked for nothing but their gradients
        with torch._C.DisableTorchFunctionSubclass():
            for param in params:
                grad = None if set_to_none else raw_grad(param)
                if grad is None or type(grad) is FreedGradient:
                    set_raw_grad(param, None)
                else:
                    grad.detach_().zero_()

    def _forget_gradients(self) -> None:
        self._reducer.forget()
        self._inner.forget_gradients()

    def check_replicas(self) -> None:
        """Compare the replicated state (factors, LSTM rows, run-global values) of all ranks that
        have it bit by bit. Collective.

        Raises:
            RuntimeError: on all ranks, naming what differs.
        """
        check_same_state(self._inner.replicated_state(), self.sharing, self._num_steps)

    def extend(self, num_steps: int) -> None:
        """See `VeLO.extend`; call it alike on all ranks."""
        self._inner.extend(num_steps)

    # ---------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The state in the keys, shapes and dtypes of the unsharded optimizer, of which this rank
        has its part; no collective.

        Save it with torch.distributed.checkpoint, or what `pylo_dist.full_state_dict` gathers with
        torch.save.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state = self._inner.state_dict()
        add_masters(state, self.inner.param_groups, self.buckets)
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
        state_dict = matched(state_dict, self.inner.param_groups, self.inner.state)
        self.check_state_dict(state_dict)
        self._inner.load_state_dict(without_masters(state_dict))
        self.state = self.inner.state
        load_masters(state_dict, self.inner.param_groups, self.buckets)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise the ValueError that `load_state_dict` would raise; changes nothing."""
        state_dict = matched(state_dict, self.inner.param_groups, self.inner.state)
        self._inner.check_state_dict(state_dict)
        check_masters(state_dict, self.inner.param_groups, self.buckets)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a ZeroOptimizer belongs to its process group and its model's memory; it cannot be "
            "copied or pickled"
        )

    # ---------------------------------------------------------------------------------------- views

    @property
    def weights(self) -> Any:
        """The learned weights of the inner optimizer; None for torch's."""
        return self._inner.weights

    @property
    def grad_norm(self) -> Tensor:
        """See `LearnedOptimizer.grad_norm`."""
        return self._inner.grad_norm

    def stats(self) -> dict[str, dict[str, Tensor]]:
        """See `LearnedOptimizer.stats`; empty for torch's optimizers."""
        return self._inner.stats()

    def report(self) -> Report:
        """The inner optimizer's report, with how evenly the work is dealt (`work_max_over_mean`,
        over all ranks).
        """
        report, share = self._inner.report(), self.sharing
        work = [
            sum(bucket.elements_of(rank) for bucket in self.buckets) for rank in range(share.ranks)
        ]
        report.heading.append(
            f"ZeRO-{self.stage}, rank {share.rank} of {share.ranks}, {len(self.buckets)} buckets, "
            f"closed at {self._cap_mb:.3g} MB"
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

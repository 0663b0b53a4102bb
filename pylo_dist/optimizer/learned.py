"""`LearnedOptimizer`: the `torch.optim.Optimizer` that users see. Owns param_groups and state; the
mathematics is its rule's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import is_dataclass
from typing import Any, Literal, Union

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .. import comm
from ..comm import Collective
from ..core.pieces import ShardBinding
from ..core.rule import LearnedRule
from ..core.state import StateField
from ..layouts import construction, plain
from ..weights import MetaNetwork
from . import checks, fsdp1_states, loading
from .callbacks import Closures, with_hooks
from .early import EarlyPass
from .engine import Clip, Engine, LossSum, Nonfinite
from .first_steps import FirstSteps
from .lineup import Lineup
from .parameters import Groups, Parameters, State, names_of, own_group, share_names
from .report import Report, group_settings, report_of
from .settings import (
    REFUSED,
    GroupNumbers,
    Habits,
    check_arguments,
    check_device_numbers,
    check_group,
    check_seed,
)

StateDtype = Union[Literal["float32", "bfloat16"], torch.dtype, None]

# what copies and pickles take along, beside what torch does; `precision` and `_width_mults` are
# faces'
_PICKLED = (
    *("rule", "weights", "given", "precision", "_clip", "_nonfinite", "_params", "_width_mults"),
)


class LearnedOptimizer(torch.optim.Optimizer, metaclass=construction.Announced):
    """A learned optimizer over whole or sharded parameters; the layout is found from the
    parameters.

    Construct one of its faces (`AdafacLO`, ...) instead. State is made at construction, in float32
    (float64 for float64 parameters) whatever the parameter's dtype, unless `state_dtype` says
    otherwise; `param_groups[i]["step"]` counts the steps taken, an int64 0-d tensor.

    Args:
        params: parameters, groups, or `named_parameters()`.
        rule: the mathematics.
        weights: the learned weights the rule computes with, for `report()`.
        defaults: the hyperparameters a group may override.
        clip, nonfinite: see `Engine`.
        process_group: ranks that average the loss; None: the world once torch.distributed is
            initialised, False: none.
        state_dtype: "bfloat16" keeps the rule's means of every element (momenta, mean square) in
            it, stochastically rounded, and all other state in float32; "float32" or None all.
        state_seed: of that rounding, an int >= 0; part of the state (`group["state_seed"]`).

    Attributes:
        early: for adapters whose gradients arrive before the step.
        timeout: seconds a step waits for other ranks, see `comm.Pending`; set by adapters.
        around: what a step's phases go through before they are served; set by adapters.

    Raises:
        ValueError: a parameter or setting that cannot be served, by name.
    """

    profile_hook_step = staticmethod(with_hooks)  # by which torch gives a class its `step`
    # whether what a closure sends is never taken for what the step sends
    closures_apart = False
    given: dict[str, Any]  # see `construction.Announced`
    group_keys: tuple[str, ...] = ()  # entries that a face adds to its groups, beside the defaults
    around: Callable[[Iterator[list[Collective]]], Iterator[list[Collective]]] | None = None

    def __init__(
        self,
        params: Any,
        rule: LearnedRule,
        weights: MetaNetwork,
        defaults: dict[str, Any],
        *,
        clip: Clip = "global",
        nonfinite: Nonfinite = "error",
        process_group: Any = None,
        state_dtype: StateDtype = None,
        state_seed: int = 0,
    ) -> None:
        checks.choose("clip", clip, ("global", "per_tensor"))
        checks.choose("nonfinite", nonfinite, ("error", "skip", "allow"))
        comm.check_group("process_group", process_group)
        halved, seed = checks.halves("state_dtype", state_dtype), check_seed(state_seed)
        if halved:  # groups of others have no use for it, and no place in their checkpoints
            defaults = {**defaults, "state_seed": seed}
        params = checks.parameters(params)
        self.rule, self.weights = rule, weights
        self.process_group = process_group
        self.timeout: float | None = None
        self._clip, self._nonfinite = clip, nonfinite
        self._params = Parameters(rule, type(self).__name__, halved)
        self._lineup = Lineup(self._params, rule, clip, nonfinite)
        self.early = EarlyPass(self._lineup, self._ready)
        self._first_steps = FirstSteps()
        self._loss: Tensor | None = None
        self._problem: Exception | None = None
        self._habits = Habits()
        self._closures = Closures()
        super().__init__(params, defaults)
        self._numbers = GroupNumbers(type(self), defaults, self.group_keys, self._check_group)

    # --------------------------------------------------------------------------------------- groups

    @construction.announced
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters (as in torch); their state is made at once. On an error the optimizer is
        as it was.
        """
        param_group = own_group(checks.group(param_group), self.param_groups)
        share_names(param_group, self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            served = {*self.defaults, *self.group_keys, loading.SEED}
            check_arguments(type(self), self.given, group, served)
            self._check_group(group)
            check_device_numbers(group)
            for name, param in zip(
                names_of(self.param_groups, group), group["params"], strict=True
            ):
                plain.check_param(name, param)
            bindings = self._params.describe(self.param_groups, self.settings())
            self._params.check_halved(group, bindings)
        except Exception:
            self.param_groups.pop()
            raise
        device = _device_of(group)
        for name, value in self.rule.group_state().items():
            group[name] = torch.as_tensor(group.get(name, value)).detach().to(device, copy=True)
        group["step"] = torch.as_tensor(
            group.get("step", 0), dtype=torch.int64, device=device
        ).clone()
        group.update(loading.marks_of(self.rule, self.weights))
        self._params.admit(self.param_groups, bindings)
        fsdp1_states.serve(group["params"], LearnedOptimizer)
        self._lineup.admit(self.param_groups, self.state)
        if _groups_of(self):
            self._ready(enter=True)  # with it a step that is refused tells the other ranks
        self._habits.look(type(self), self.param_groups)

    def settings(self) -> list[str]:
        """What must be the same on all ranks beside the parameters, for adapters to compare."""
        plain_types = (bool, int, float, str, tuple, type(None))
        entries = {
            **vars(self.rule),
            "clip": self._clip,
            "nonfinite": self._nonfinite,
            "weights": self.weights.describe(),
            "state_dtype": "bfloat16" if self._params.halved else "float32",
        }
        rule = [
            f"{k}={v}"
            for k, v in sorted(entries.items())
            if isinstance(v, plain_types) or is_dataclass(v)
        ]
        return [type(self).__name__, *rule, *group_settings(self.param_groups)]

    @classmethod
    def before_sharding(
        cls, named: Iterable[tuple[str, Tensor]], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Keyword arguments for a constructor that will see pieces of the parameters only.

        Adapters that replace parameters call it with the whole ones, so that a face can record what
        is lost by sharding.
        """
        return kwargs

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for settings of a group that cannot be served. Faces with settings of
        their own extend it.
        """
        check_group(group)

    # ----------------------------------------------------------------------------------------- step

    @_disable_dynamo
    def set_loss(self, loss: Tensor | float) -> None:
        """Give the loss of the coming step, where `step()` is called by code that cannot pass
        it.
        """
        try:  # what is wrong is raised by the step itself, on all ranks
            self._loss = scalar_loss(loss)
        except ValueError as problem:
            self.fail_next_step(problem)

    def fail_next_step(self, problem: Exception) -> None:
        """Have the next `step()` raise `problem`, and a `PeerError` on the ranks it shares tensors
        with, before anything changes.

        For adapters: an error raised on one rank alone would leave the others in a collective.
        """
        self._problem = self._problem or problem

    @_disable_dynamo  # as torch marks parts of its own optimizers
    @torch.no_grad()
    def step(self, closure: Any = None, *, loss: Tensor | float | None = None) -> Any:
        """Take one step. torch.compile leaves it to Python.

        Args:
            closure: re-evaluates the model and returns the loss; a tensor or a number in its place
                is the loss. What it raises on one rank after its last collective is a PeerError on
                the others.
            loss: scalar training loss of this step; only rules that read the loss need it.

        Returns:
            The loss as given or as the closure returned it, else None.

        Raises:
            NonFiniteGradientError: see `nonfinite`.
        """
        if closure is not None and not callable(closure):
            closure, loss = None, closure
        if closure is not None:
            loss, problem = self._closures.evaluate(closure, _groups_of(self))
            if problem is not None:
                self.fail_next_step(problem)
        if loss is not None:
            self.set_loss(loss)
        phases = self.phases()
        comm.serve(phases if self.around is None else self.around(phases), self.timeout)
        return loss

    def phases(self) -> Iterator[list[Collective]]:
        """One step as a generator of the collectives it needs (see `Engine.phases`); `step()`
        serves them.
        """
        lineup = self._lineup
        if self.weights.is_random:
            self._habits.untrained(type(self).__name__)
        problem, self._problem = self._problem, None
        try:
            engine = self._ready(enter=True)
            problem = problem or self._params.left_out(self.param_groups, self.state)
        except ValueError as error:
            if lineup.engine is None:
                raise
            # over the parameters of before: the ranks that share them hear of it in its first sum
            engine, problem = lineup.engine, problem or error
        loss, self._loss = self._loss, None
        losses = LossSum.over(self.process_group, loss) if self.rule.needs_loss else None
        problem = self._numbers.read(self.param_groups, problem)
        others = self._first_steps.others(self, self.rule, self._clip, self._nonfinite)
        problem = problem or others
        try:
            problem = yield from lineup.collect(self.early.taken(), problem)
            if not engine.shared:
                asks = self.process_group is None
                problem = self._first_steps.check(self._params, lineup.bound, problem, asks)
            with self._numbers.standing_in():
                yield from engine.phases(losses, problem, self._numbers)
            if engine.idle:
                self._habits.idle(type(self).__name__)
            for group in self.param_groups:
                group["step"].add_(engine.taken.to(group["step"].device))
            lineup.publish()
        finally:
            # held until the next step, gradients would be there twice in the next backward pass
            self.early.forget()

    def _ready(self, enter: bool = False) -> Engine:
        """The engine over the parameters there are now; `enter`: see `Parameters.taking_part`."""
        self._params.follow(self.param_groups, self.state, self.settings)
        return self._lineup.ready(self.param_groups, self.state, enter)

    def layouts(self) -> list[tuple[ShardBinding, Tensor]]:
        """Every parameter with where its elements lie."""
        self._params.follow(self.param_groups, self.state, self.settings)
        return self._params.bound(self.param_groups)

    def state_fields(self, param: Tensor) -> dict[str, StateField]:
        """What the state of a parameter of this optimizer consists of."""
        return dict(self._params.fields[param])

    @property
    def grad_norm(self) -> Tensor:
        """Norm of the raw gradients of the last step over all tensors and ranks, float64 0-d on the
        device.
        """
        return self._ready().grad_norm

    # ---------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """As in torch, in the keys, shapes and dtypes of the unsharded optimizer whatever the
        layout.

        Sharded state is a `ShardedState` (sharded_state.py), which torch.distributed.checkpoint
        saves and loads; no collective. Groups without names of their own are given `group{i}.{j}`.
        Raises a NonFiniteGradientError still pending from the last step on a GPU.
        """
        if self._lineup.engine is not None:
            self._lineup.engine.raise_pending()
        with self.register_state_dict_post_hook(
            lambda _, saved: loading.unsharded(saved, self.param_groups, self._params),
            prepend=True,
        ):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but state has the dtype that this optimizer keeps it in, whatever the
        parameters' and that of the state loaded, and shares no memory with `state_dict`.

        Args:
            state_dict: of the same optimizer in any layout: tensors are whole, or sharded so that
                this rank has its elements. Parameters that were never trained may be missing, or
                be in it alone, where both sides have names.

        Raises:
            ValueError: state of another model, rule, meta-network or format, or state that is
                missing or misshapen, by key or parameter; nothing has been changed then.
        """
        own: dict[Tensor, State] = {}

        def take(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            loaded = self.check_state_dict(loaded)
            own.update(loading.own_state(loaded, self.param_groups, self._params))
            # torch's way with state casts and shares memory
            return loading.without_state(loaded, self.param_groups)

        with (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(lambda _: self.state.update(own), prepend=True),
        ):
            super().load_state_dict(state_dict)
        self.early.forget()
        self._lineup.retire()
        if _groups_of(self):
            self._ready()  # as in `add_param_group`

    def check_state_dict(self, loaded: dict[str, Any]) -> dict[str, Any]:
        """Raise the ValueError that `load_state_dict` would raise; changes nothing.

        Returns:
            The same state dict with the parameters of this optimizer, see `loading.matched`.
        """
        loading.check_parts(loaded, type(self).__name__)
        loaded = loading.matched(loaded, self.param_groups, self.state)
        loaded = loading.with_seeds_of(self.param_groups, loaded)
        self.check_groups(loaded["param_groups"])
        loading.check_group_state(loaded["param_groups"], self.rule)
        loading.check_states(loaded, self.param_groups, self.state, self._params)
        return loaded

    def check_groups(self, groups: Groups) -> None:
        """As `check_state_dict`, of the parameter groups alone."""
        settings = (name for name in self.defaults if name not in (*REFUSED, loading.SEED))
        keys = ("step", *self.group_keys, *self.rule.group_state(), *settings)
        loading.check_groups(
            groups,
            self.param_groups,
            keys,
            loading.marks_of(self.rule, self.weights),
            loading.earlier_marks_of(self.weights),
        )
        for i, group in enumerate(groups):  # what faces have beside, the next step looks at
            try:
                check_group(group)
            except ValueError as error:
                raise ValueError(f"group {i} of the state: {error}") from None

    def state_template(self, param: Tensor) -> State:
        """New state tensors of a parameter as `state_dict` has them, zeros, to be loaded into."""
        (state,) = self._params.new_states([param])
        return self._params.canonical(param, state)

    def __getstate__(self) -> dict[str, Any]:
        for binding in self._params.bindings.values():
            if binding.holders is not None:
                raise TypeError(
                    f"{binding.shard.fqn!r} lies on several ranks: a {type(self).__name__} over it "
                    "belongs to its process groups and its model's memory, and cannot be copied or "
                    "pickled; build one on the other model and load this one's state_dict(), or "
                    "save it with pylo_dist.checkpoint"
                )
        kept = {name: value for name, value in self.__dict__.items() if name in _PICKLED}
        apart = ("weights", "process_group")  # kept as they were understood, if at all
        kept["given"] = {name: value for name, value in self.given.items() if name not in apart}
        if self.process_group is False:
            kept["process_group"] = False
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_lineup" not in self.__dict__:  # a copy, of which `__getstate__` made the state
            # a group cannot be pickled: None finds the world again
            self.__dict__.setdefault("process_group", None)
            self.timeout = None
            self._lineup = Lineup(self._params, self.rule, self._clip, self._nonfinite)
            self.early = EarlyPass(self._lineup, self._ready)
            self._first_steps = FirstSteps(looks=0)
            self._loss = None
        self._problem = None  # a loaded state leaves the loss given for the coming step
        self._habits = Habits()
        self._closures = Closures()
        self._numbers = GroupNumbers(type(self), self.defaults, self.group_keys, self._check_group)
        for group in self.param_groups:
            # those of an earlier version are not handed on
            group.update(loading.marks_of(self.rule, self.weights))
            for name, value in loading.group_state(self.rule).items():
                group[name] = torch.as_tensor(
                    group[name], dtype=value.dtype, device=_device_of(group)
                )

    # ---------------------------------------------------------------------------------------- views

    def report(self) -> Report:
        """One row per parameter: what it is, where it lies, which rule drives it, and the bytes of
        its state on this rank.
        """
        seeds = dict.fromkeys(str(group.get(loading.SEED)) for group in self.param_groups)
        halved = f", state in bfloat16 (seed {', '.join(seeds)})" if self._params.halved else ""
        return report_of(
            f"{type(self).__name__}, {self.weights.describe()}{halved}",
            self.rule,
            (
                (binding, param, self._params.fields[param], self.state.get(param, {}))
                for binding, param in self._params.bound(self.param_groups)
            ),
        )

    def stats(self) -> dict[str, dict[str, Tensor]]:
        """Figures per parameter, as 0-d tensors on its device, without a collective or a
        synchronisation.

        `update_ratio`: rms of the update over rms of the parameter before it. For a parameter
        sharded over ranks it is of the last step but one: the squared update is added over the
        ranks in the first reduction of the step that follows. `clip_rate`: share of the steps,
        since the set of parameters last changed, in which its gradient was clipped.
        """
        return self._ready().stats()


def scalar_loss(loss: Tensor | float) -> Tensor:
    """A loss as a tensor of one element without history; a number keeps its 64 bits. Raises
    ValueError for anything else.
    """
    try:
        dtype = None if isinstance(loss, Tensor) else torch.float64
        tensor = torch.as_tensor(loss, dtype=dtype).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"loss={loss!r}: wanted a scalar tensor or a number") from None
    if tensor.numel() != 1:
        raise ValueError(
            f"the loss has shape {tuple(tensor.shape)}; wanted a scalar, such as its mean"
        )
    return tensor


def _groups_of(optimizer: LearnedOptimizer) -> list[Any]:
    """Those in which its step adds up."""
    found = [binding.holders for binding in optimizer._params.bindings.values()]
    if optimizer.rule.needs_loss:
        found.append(LossSum.over(optimizer.process_group, None).group)
    return list({id(group): group for group in found if group is not None}.values())


def _device_of(group: dict[str, Any]) -> torch.device:
    return group["params"][0].device if group["params"] else torch.device("cpu")

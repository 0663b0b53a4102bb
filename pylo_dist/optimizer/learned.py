"""`LearnedOptimizer`: the `torch.optim.Optimizer` that users see. Owns param_groups and state; the
mathematics is its rule's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .. import comm
from ..comm import Collective
from ..core.pieces import ShardBinding
from ..core.rule import Batch, Item, LearnedRule
from ..core.shards import TensorShard
from ..core.state import StateField, allocate_state, state_dtype
from ..layouts import construction, dtensor, gradients, plain
from ..maths.factored import FactoredRule
from ..weights import MetaNetwork
from .engine import Clip, Engine, LossSum, Nonfinite
from .report import Report, group_settings, num_bytes, report_row
from .sharded_state import OTHER_MARKS, STATE_FORMAT, canonical, covering_gap, local_part, same_name

_REFUSED = ("foreach", "fused", "capturable", "differentiable", "maximize")


class LearnedOptimizer(torch.optim.Optimizer, metaclass=construction.Announced):
    """A learned optimizer over whole or sharded parameters; the layout is found from the
    parameters.

    Construct one of its faces (`AdafacLO`, ...) instead. State is made at construction, in float32
    (float64 for float64 parameters) whatever the parameter's dtype; `param_groups[i]["step"]`
    counts the steps taken, an int64 0-d tensor.

    Args:
        params: parameters, groups, or `named_parameters()`.
        rule: the mathematics.
        weights: the learned weights the rule computes with, for `report()`.
        defaults: the hyperparameters a group may override.
        clip, nonfinite: see `Engine`.
        process_group: ranks that average the loss; None: the world once torch.distributed is
            initialised, False: none.

    Raises:
        ValueError: a parameter or setting that cannot be served, by name.
    """

    group_keys: tuple[str, ...] = ()  # entries that a face adds to its groups, beside the defaults
    _engine: Engine | None = None

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
    ) -> None:
        _choose("clip", clip, ("global", "per_tensor"))
        _choose("nonfinite", nonfinite, ("error", "skip", "allow"))
        self.rule, self.weights = rule, weights
        self.process_group = process_group
        self._clip, self._nonfinite = clip, nonfinite
        self._bindings: dict[Tensor, ShardBinding] = {}
        self._fields: dict[Tensor, dict[str, StateField]] = {}
        self._engine_params: list[tuple[Tensor, Item]]
        self._engine_key: list[tuple[Tensor, int]]
        self._places: dict[int, tuple[int, int]]  # id(parameter) -> its batch, and its place there
        # id(parameter) -> the gradient that was read early, and its version then
        self._early: dict[int, tuple[Tensor, int]]
        self._forget_engine()
        self._loading: dict[str, Any] | None = None
        self._loss: Tensor | None = None
        self._problem: ValueError | None = None
        self.timeout: float | None = None  # seconds, see comm.Pending; set by adapters
        self._had_gradients = False
        self._looks = construction.LOOKS
        super().__init__(params, defaults)

    # --------------------------------------------------------------------------------------- groups

    @construction.announced
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters (as in torch); their state is made at once. On an error the optimizer is
        as it was.
        """
        super().add_param_group(
            self._own_group(param_group) if isinstance(param_group, dict) else param_group
        )
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for name, param in zip(self._names(group), group["params"], strict=True):
                plain.check_param(name, param)
            # of the other groups too: a copy of them may lie on ranks that this group brings in
            bindings = self._describe_all()
        except Exception:
            self.param_groups.pop()
            raise
        device = group["params"][0].device if group["params"] else torch.device("cpu")
        for name, value in self.rule.group_state().items():
            group[name] = torch.as_tensor(group.get(name, value)).detach().to(device, copy=True)
        group["step"] = torch.as_tensor(
            group.get("step", 0), dtype=torch.int64, device=device
        ).clone()
        group.update(self._marks())
        self._bindings.update(bindings)
        self._fields.update(
            {p: self.rule.state_fields(bindings[p].shard, group) for p in group["params"]}
        )
        self._forget_engine()
        self._ready()

    def _describe_all(self) -> dict[Tensor, ShardBinding]:
        """Where the elements of all parameters lie, as far as their groups are known; collective
        where there are DTensors.
        """
        named = [
            pair
            for group in self.param_groups
            for pair in zip(self._names(group), group["params"], strict=True)
        ]
        construction.meet(named, type(self).__name__)
        return {
            param: binding
            for (_, param), binding in zip(
                named, dtensor.describe_all(named, self.settings()), strict=True
            )
        }

    def _follow_replaced_params(self) -> None:
        """Take over parameters that a library put in the place of ours before the first step
        (accelerate, under FSDP2).

        Raises:
            ValueError: steps were taken, and the state belongs to the parameters that are gone.
        """
        if all(param in self._bindings for group in self.param_groups for param in group["params"]):
            return
        for group in self.param_groups:
            for name, param in zip(self._names(group), group["params"], strict=True):
                plain.check_param(name, param)
                if param not in self._bindings and bool(group["step"] > 0):
                    raise ValueError(
                        f"{name!r} was replaced by another tensor after {int(group['step'])} "
                        "steps, and its state belongs to the old one: shard the model before the "
                        "first step"
                    )
        self._bindings = self._describe_all()
        self._fields = {
            param: self.rule.state_fields(self._bindings[param].shard, group)
            for group in self.param_groups
            for param in group["params"]
        }
        for param in [param for param in self.state if param not in self._bindings]:
            del self.state[param]
        self._forget_engine()

    def _own_group(self, given: dict[str, Any]) -> dict[str, Any]:
        """A copy of a caller's group, which stays as it is. Raises ValueError for a parameter that
        is in a group already.
        """
        if isinstance(given["params"], set):
            return dict(given)  # refused by torch
        entries = (
            [given["params"]] if isinstance(given["params"], Tensor) else list(given["params"])
        )
        known = {
            id(param): i for i, group in enumerate(self.param_groups) for param in group["params"]
        }
        new = len(self.param_groups)
        for j, entry in enumerate(entries):
            name, param = entry if isinstance(entry, tuple) else (f"group{new}.{j}", entry)
            if id(param) in known:
                i = known[id(param)]
                where = "in the same group twice" if i == new else f"already in parameter group {i}"
                raise ValueError(f"{name!r} is {where}; list a tied parameter once")
            known[id(param)] = new
        return {**given, "params": entries}

    def settings(self) -> list[str]:
        """What must be the same on all ranks beside the parameters, for adapters to compare."""
        plain_types = (bool, int, float, str, tuple, type(None))
        entries = {
            **vars(self.rule),
            "clip": self._clip,
            "nonfinite": self._nonfinite,
            "weights": self.weights.describe(),
        }
        rule = [
            f"{k}={v}"
            for k, v in sorted(entries.items())
            if isinstance(v, plain_types) or is_dataclass(v)
        ]
        return [type(self).__name__, *rule, *group_settings(self.param_groups)]

    def _names(self, group: dict[str, Any]) -> list[str]:
        """Full names of the parameters of a group of this optimizer: as given, else `group{i}.{j}`."""
        i = next(i for i, other in enumerate(self.param_groups) if other is group)
        given: list[str] | None = group.get("param_names")
        return given or [f"group{i}.{j}" for j in range(len(group["params"]))]

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
        for key in _REFUSED:
            if group.get(key):
                raise ValueError(
                    f"{key}=True in a parameter group: learned optimizers have no such mode; leave "
                    "it out"
                )
        for key in ("lr", "weight_decay", "exp_mult", "step_mult"):
            value = group.get(key, 0.0)
            number = float(value) if isinstance(value, Tensor) and value.dim() == 0 else value
            if not (isinstance(number, (int, float)) and 0.0 <= number < math.inf):
                raise ValueError(f"{key}={value!r}: wanted a finite number >= 0")
        limit = group.get("max_grad_norm")
        if limit is not None and not (isinstance(limit, (int, float)) and limit > 0.0):
            raise ValueError(
                f"max_grad_norm={limit!r}: wanted a number > 0, or None for no clipping"
            )

    # ----------------------------------------------------------------------------------------- step

    def set_loss(self, loss: Tensor | float) -> None:
        """Give the loss of the coming step, where `step()` is called by code that cannot pass it."""
        loss = torch.as_tensor(loss).detach()
        if loss.numel() != 1:  # raised by the step itself, on all ranks
            self.fail_next_step(
                ValueError(
                    f"the loss has shape {tuple(loss.shape)}; wanted a scalar, such as its mean"
                )
            )
            return
        self._loss = loss

    def fail_next_step(self, problem: ValueError) -> None:
        """Have the next `step()` raise `problem`, and a `PeerError` on the ranks it shares tensors
        with, before anything changes.

        For adapters: an error raised on one rank alone would leave the others in a collective.
        """
        self._problem = self._problem or problem

    def _loss_group(self) -> Any:
        """The ranks whose losses are averaged; None for this one alone."""
        if self.process_group is None:
            return comm.default_group()
        return self.process_group or None

    @torch.no_grad()
    def step(self, closure: Any = None, *, loss: Tensor | None = None) -> Any:
        """Take one step.

        Args:
            closure: re-evaluates the model and returns the loss; a tensor in its place is the loss.
            loss: scalar training loss of this step; only rules that read the loss need it.

        Returns:
            The loss as given or as the closure returned it, else None.

        Raises:
            NonFiniteGradientError: see `nonfinite`.
        """
        if isinstance(closure, Tensor):
            closure, loss = None, closure
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if loss is not None:
            self.set_loss(loss)
        comm.serve(self.phases(), self.timeout)
        return loss

    def phases(self) -> Iterator[list[Collective]]:
        """One step as a generator of the collectives it needs (see `Engine.phases`); `step()`
        serves them.
        """
        engine = self._ready()
        problem, self._problem = self._problem, None
        early = self._early_items(engine)
        settled = yield from gradients.settle(
            [(self._bindings[param], param) for param, _ in self._engine_params]
        )
        for param, item in self._engine_params:
            if id(param) in early:
                item.param.present = self._bindings[param].present
                continue
            try:
                item.param = plain.collect(
                    self._bindings[param],
                    param,
                    settled.sums.get(id(param)),
                    item.param,
                    item.state,
                )
            except ValueError as error:
                problem = problem or error
                item.param = plain.absent(self._bindings[param], param)
            item.param.grad = settled.means.get(id(param), item.param.grad)
        if self._looks and self.process_group is None and not engine.shared:
            self._looks -= 1
            construction.check_alone(self._bindings, type(self).__name__)
        if not self._had_gradients:
            self._had_gradients = any(param.grad is not None for param, _ in self._engine_params)
            named = [(self._bindings[param].shard.fqn, param) for param, _ in self._engine_params]
            if not self._had_gradients and not engine.shared:
                problem = problem or dtensor.left_behind(named)
        losses: LossSum | None = None
        if self.rule.needs_loss:
            losses = LossSum(self._loss, self._loss_group())
        self._loss = None
        try:
            yield from engine.phases(losses, problem)
            for group in self.param_groups:
                group["step"].add_(engine.taken.to(group["step"].device))
            for param, item in self._engine_params:
                plain.publish(item.param, param)
        finally:
            # held until the next step, gradients would be there twice in the next backward pass
            for _, item in self._engine_params:
                item.param.grad = None

    @torch.no_grad()
    def gradients_arrived(self, params: Iterable[Tensor]) -> None:
        """Let the coming step begin with these parameters: what it reads of their gradients alone
        is computed now.

        For adapters whose gradients arrive bit by bit. The step reads a gradient again if its
        version counter shows a change; what leaves no trace there (torch's GradScaler) needs
        `forget_gradients`.
        """
        work = self._ready().work
        arrived: dict[int, list[int]] = {}
        for param in params:
            w, i = self._places.get(id(param), (-1, 0))
            if w < 0 or param.grad is None or not isinstance(work[w][0], FactoredRule):
                continue
            item = work[w][1].items[i]
            try:
                item.param = plain.collect(self._bindings[param], param, state=item.state)
            except ValueError:  # the step will say it
                continue
            self._early[id(param)] = (param.grad, param.grad._version)
            arrived.setdefault(w, []).append(i)
        for w, indices in arrived.items():
            rule, batch = work[w]
            cast(FactoredRule, rule).gradient_pass(batch, indices)

    def forget_gradients(self) -> None:
        """Undo `gradients_arrived`: the step it was for will not be taken."""
        self._early.clear()
        for _, batch in self._engine.work if self._engine is not None else []:
            batch.summed.clear()
            for item in batch.items:
                item.param.grad = None  # it would be in memory until the next step

    def _early_items(self, engine: Engine) -> set[int]:
        """Parameters (by id) of which the step has all it needs of their gradient; what was changed
        since is forgotten.
        """
        early, self._early = self._early, {}
        valid = set()
        for param, _ in self._engine_params:
            grad, version = early.get(id(param), (None, 0))
            if grad is not None and param.grad is grad and grad._version == version:
                valid.add(id(param))
            elif grad is not None:
                w, i = self._places[id(param)]
                rule, batch = engine.work[w]
                cast(FactoredRule, rule).forget_gradient(batch, i)
        return valid

    def _ready(self) -> Engine:
        """The engine over all trainable, non-empty parameters, made again when they or their state
        tensors are others.
        """
        self._follow_replaced_params()
        trainable = [
            (param, group)
            for group in self.param_groups
            for param in group["params"]
            if param.requires_grad and self._bindings[param].shard.global_numel
        ]
        params = [param for param, _ in trainable]
        if self._engine is not None and _same_key(self._key(params), self._engine_key):
            return self._engine
        by_device: dict[torch.device, list[Item]] = {}
        self._forget_engine()
        for param, group in trainable:
            binding = self._bindings[param]
            fields = self._fields[param]
            if not self.state[param]:
                self.state[param] = self._shown(param, allocate_state(fields, binding.shard, param))
            state = {
                name: fields[name].flat(plain.local_tensor(tensor))
                for name, tensor in self.state[param].items()
            }
            item = Item(
                plain.without_gradient(binding, param),
                state,
                group,
                self.rule.dims(binding.shard.shape),
            )
            by_device.setdefault(param.device, []).append(item)
            self._engine_params.append((param, item))
        if self.rule.needs_loss and len(by_device) > 1:
            raise ValueError(
                f"{type(self).__name__} couples all tensors; they are on "
                f"{[str(d) for d in by_device]}, wanted one device"
            )
        work = [
            (self.rule, Batch.of(items, self.param_groups, device))
            for device, items in by_device.items()
        ]
        places = {
            id(item): (w, i)
            for w, (_, batch) in enumerate(work)
            for i, item in enumerate(batch.items)
        }
        self._places = {id(param): places[id(item)] for param, item in self._engine_params}
        self._engine, self._engine_key = (
            Engine(work, self._nonfinite, self._clip),
            self._key(params),
        )
        return self._engine

    def _shown(self, param: Tensor, local: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of a parameter as `state` shows it: what is sharded as a DTensor is a DTensor."""
        if not plain.is_dtensor(param):
            return local
        fields = self._fields[param]
        return {
            name: tensor
            if fields[name].replicated is not None
            else dtensor.wrap_like(param, tensor, len(fields[name].copies))
            for name, tensor in local.items()
        }

    def _key(self, params: list[Tensor]) -> list[tuple[Tensor, int]]:
        """What an engine is built on: parameters, and their state with its memory, which callers
        may have replaced.
        """
        key = [(param, 0) for param in params]
        for param in params:
            key += [
                (tensor, plain.local_tensor(tensor).data_ptr())
                for tensor in self.state.get(param, {}).values()
            ]
        return key

    def layouts(self) -> list[tuple[ShardBinding, Tensor]]:
        """Every parameter with where its elements lie."""
        self._ready()
        return [
            (self._bindings[param], param)
            for group in self.param_groups
            for param in group["params"]
        ]

    def state_fields(self, param: Tensor) -> dict[str, StateField]:
        """What the state of a parameter of this optimizer consists of."""
        return dict(self._fields[param])

    def _forget_engine(self) -> None:
        retired, self._engine = self._engine, None
        self._engine_params, self._engine_key, self._places, self._early = [], [], {}, {}
        if retired is not None:
            retired.retire()  # last: its warning may be made an error

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
        if self._engine is not None:
            self._engine.raise_pending()

        def unsharded(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            for saved, param in self._saved_to_param(state_dict["param_groups"]).items():
                if saved in state_dict["state"]:
                    fields, binding = self._fields[param], self._bindings[param]
                    state_dict["state"][saved] = {
                        name: canonical(tensor, fields[name], binding) if name in fields else tensor
                        for name, tensor in state_dict["state"][saved].items()
                    }
                elif param.requires_grad and not self._bindings[param].shard.global_numel:
                    # torch's set_optimizer_state_dict misses it otherwise
                    state_dict["state"][saved] = {}
            for saved_group, group in zip(
                state_dict["param_groups"], self.param_groups, strict=True
            ):
                saved_group["param_names"] = list(self._names(group))
            return state_dict

        handle = self.register_state_dict_post_hook(unsharded, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but state keeps its dtype (float32 for bfloat16 parameters) and shares no
        memory with `state_dict`.

        Args:
            state_dict: of the same optimizer in any layout: tensors are whole, or sharded so that
                this rank has its elements.

        Raises:
            ValueError: state of another model, rule, meta-network or format, or state that is
                missing or misshapen, by key or parameter; nothing has been changed then.
        """

        def check(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            self.check_state_dict(loaded)
            # names are the model's own; where the state has none torch keeps those of the group
            groups = [
                {key: value for key, value in g.items() if key != "param_names"}
                for g in loaded["param_groups"]
            ]
            self._loading = {**loaded, "param_groups": groups}
            return {**self._loading, "state": {}}  # see `_exact_state`

        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    def _saved_to_param(self, groups: list[dict[str, Any]]) -> dict[Any, Tensor]:
        return {
            saved: param
            for saved_group, group in zip(groups, self.param_groups, strict=True)
            for saved, param in zip(saved_group["params"], group["params"], strict=True)
        }

    def _marks(self) -> dict[str, Any]:
        """What every group says about its state, so that every format of a checkpoint holds it."""
        return {
            "state_format": STATE_FORMAT,
            "state_rule": self.rule.name,
            "state_weights": self.weights.digest,
        }

    def check_state_dict(self, loaded: dict[str, Any]) -> None:
        """Raise the ValueError that `load_state_dict` would raise; changes nothing."""
        for key in ("param_groups", "state"):
            if key not in loaded:
                raise ValueError(
                    f"the state has no {key!r}; wanted what state_dict() of {type(self).__name__} "
                    "returned"
                )
        self.check_groups(loaded["param_groups"])
        for saved, param in self._saved_to_param(loaded["param_groups"]).items():
            state = loaded["state"].get(saved, {})
            if state or self.state.get(param):
                self._check_param_state(param, state)

    def check_groups(self, groups: list[dict[str, Any]]) -> None:
        """As `check_state_dict`, of the parameter groups alone."""
        saved_sizes = [len(group["params"]) for group in groups]
        own_sizes = [len(group["params"]) for group in self.param_groups]
        if saved_sizes != own_sizes:
            raise ValueError(
                f"the state holds groups of {saved_sizes} parameters, this optimizer groups of "
                f"{own_sizes}; build the optimizer with the groups that were saved"
            )
        for i, group in enumerate(groups):
            self._check_group_state(i, group)

    def state_template(self, param: Tensor) -> dict[str, Tensor]:
        """New state tensors of a parameter as `state_dict` has them, zeros, to be loaded into."""
        fields, binding = self._fields[param], self._bindings[param]
        state = self._shown(param, allocate_state(fields, binding.shard, param))
        return {name: canonical(tensor, fields[name], binding) for name, tensor in state.items()}

    def _check_group_state(self, i: int, group: dict[str, Any]) -> None:
        settings = (name for name in self.defaults if name not in _REFUSED)
        for key in ("step", *self.group_keys, *self.rule.group_state(), *settings, *self._marks()):
            if key not in group:
                raise ValueError(
                    f"group {i} of the state has no {key!r}; was it saved by another optimizer?"
                )
        for key, wanted in self._marks().items():
            if group[key] != wanted:
                raise ValueError(
                    f"group {i} of the state has {key} {group[key]!r}, this optimizer {wanted!r}; "
                    f"{OTHER_MARKS[key]}"
                )
        names = self._names(self.param_groups[i])
        for saved, own in zip(group.get("param_names") or names, names, strict=False):
            if not same_name(saved, own):
                raise ValueError(
                    f"group {i} of the state has {saved!r} in the place of {own!r}: it belongs to "
                    "another model, or has its parameters in another order; build the optimizer "
                    "as it was saved (without 'param_names' in its groups a state loads by "
                    "position)"
                )

    def _check_param_state(self, param: Tensor, state: dict[str, Any]) -> None:
        shard = self._bindings[param].shard
        for name, field in self._fields[param].items():
            got, wanted, dtype = (
                state.get(name),
                field.canonical_shape(shard.shape),
                state_dtype(param.dtype),
            )
            if isinstance(got, Tensor) and (tuple(got.shape), got.dtype) == (wanted, dtype):
                whole = field.replicated is not None
                cut, copies = (
                    (TensorShard.whole(shard.fqn, wanted), ()) if whole else (shard, field.copies)
                )
                if gap := covering_gap(got, copies, cut):
                    raise ValueError(
                        f"state {name!r} of {shard.fqn!r}: {gap} elements of this rank are on "
                        "other ranks; load it through torch.distributed.checkpoint, or give whole "
                        "tensors (pylo_dist.full_state_dict)"
                    )
                continue
            found = "nothing" if got is None else type(got).__name__
            if isinstance(got, Tensor):
                found = (
                    f"shape {tuple(got.shape)}" if tuple(got.shape) != wanted else str(got.dtype)
                )
            asked = (
                str(dtype)
                if isinstance(got, Tensor) and tuple(got.shape) == wanted
                else f"shape {wanted}"
            )
            raise ValueError(
                f"state {name!r} of {shard.fqn!r}: found {found}, wanted {asked}; the state "
                "belongs to another model, optimizer or layout"
            )

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name in _PICKLED}
        if self.process_group is False:
            kept["process_group"] = False
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if self.__dict__.get("_loading") is not None:
            state["state"] = self._exact_state(cast(dict[str, Any], self._loading))
        super().__setstate__(state)
        self.__dict__.setdefault("_had_gradients", False)
        self.__dict__.setdefault("_looks", 0)
        # a group cannot be pickled: None finds the world again
        self.__dict__.setdefault("process_group", None)
        self._loading = self._loss = self._problem = self.timeout = None
        for group in self.param_groups:
            device = group["params"][0].device if group["params"] else torch.device("cpu")
            for name, value in {
                "step": torch.zeros((), dtype=torch.int64),
                **self.rule.group_state(),
            }.items():
                group[name] = torch.as_tensor(group[name], dtype=value.dtype, device=device)
        self._forget_engine()

    def _exact_state(self, loaded: dict[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
        """This rank's elements of the loaded state per parameter, copied to its device."""
        exact: dict[Tensor, dict[str, Tensor]] = copy.copy(self.state)
        exact.clear()
        for saved, param in self._saved_to_param(loaded["param_groups"]).items():
            fields = self._fields[param]
            entries = loaded["state"].get(saved)
            if entries:
                shard = self._bindings[param].shard
                parts = {
                    name: local_part(entries[name], field, shard, param)
                    for name, field in fields.items()
                }
                exact[param] = self._shown(param, parts)
        return exact

    # ---------------------------------------------------------------------------------------- views

    def report(self) -> Report:
        """One row per parameter: what it is, where it lies, which rule drives it, and the bytes of
        its state on this rank.
        """
        rows = []
        totals = {
            "parameters": 0,
            "numel": 0,
            "global_numel": 0,
            "sharded_state_bytes": 0,
            "replicated_state_bytes": 0,
        }
        for group in self.param_groups:
            for param in group["params"]:
                binding, state = self._bindings[param], self.state.get(param, {})
                shard, fields = binding.shard, self._fields[param]
                rule = self.rule.describe(fields, binding) if param.requires_grad else "frozen"
                rows.append(
                    report_row(
                        shard, param.dtype, rule, state, comm.size(binding.group), binding.replicas
                    )
                )
                totals["parameters"] += 1
                totals["numel"] += shard.numel
                totals["global_numel"] += shard.global_numel
                for name, tensor in state.items():
                    kind = (
                        "sharded_state_bytes"
                        if fields[name].replicated is None
                        else "replicated_state_bytes"
                    )
                    totals[kind] += num_bytes(tensor)
        return Report(rows, [f"{type(self).__name__}, {self.weights.describe()}"], totals)

    def stats(self) -> dict[str, dict[str, Tensor]]:
        """Figures per parameter, as 0-d tensors on its device, without a collective or a
        synchronisation.

        `update_ratio`: rms of the update over rms of the parameter before it. For a parameter
        sharded over ranks it is of the last step but one: the squared update is added over the
        ranks in the first reduction of the step that follows. `clip_rate`: share of the steps,
        since the set of parameters last changed, in which its gradient was clipped.
        """
        return self._ready().stats()


def _same_key(key: list[tuple[Tensor, int]], other: list[tuple[Tensor, int]]) -> bool:
    return [(id(tensor), memory) for tensor, memory in key] == [
        (id(tensor), memory) for tensor, memory in other
    ]


_PICKLED = (
    "rule",
    "weights",
    "precision",
    "_clip",
    "_nonfinite",
    "_bindings",
    "_fields",
    "_width_mults",
)


def _choose(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: wanted one of {', '.join(map(repr, choices))}")

"""DeepSpeed, stages 0 to 3: an exact learned step on the partitions that DeepSpeed made.

DeepSpeed hands its optimizer flat pieces of the parameters, a few at a time, and expects
elementwise arithmetic. Here it holds a `DeepSpeedOptimizer`, which collects the gradients of all
flat tensors of a step, takes the learned step once over local views of them, and repeats
DeepSpeed's write-back where that has happened too early. Writes DeepSpeed's flat float32 tensors
and the copies made from them; where these lie is in `layout`, what backward passes leave in
`backward`, the JSON's arguments in `arguments`.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import comm
from ...core.pieces import bound_shard
from ...core.shards import TensorShard
from ...optimizer import LearnedOptimizer
from ...optimizer.report import Report
from ...optimizer.settings import LearningRateWarning
from ...optimizer.sharded_state import ShardedState
from .arguments import check_groups, checked_arguments, probe, together
from .backward import BackwardRecord
from .layout import Layout, Source, find_layout

STATE_KEY = "pylo_dist"  # in the optimizer state of DeepSpeed's files

_NO_LOSS = (
    "this optimizer reads the training loss, and there was none since the last step: call "
    "engine.backward(loss) in place of loss.backward(), or engine.basic_optimizer.set_loss(loss) "
    "before engine.step()"
)


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
        # what errors are about
        self._where = f'DeepSpeed JSON, "params" of "optimizer" ("type": "{self.face.__name__}")'
        probed = together(self._where, lambda: probe(self.face, kwargs))
        self._kwargs = {**checked_arguments(self.face, kwargs), "weights": probed.weights}
        self._defaults = probed.defaults
        super().__init__(params, probed.defaults)
        self._inner: LearnedOptimizer | None = None
        self._layout = Layout("whole", None)
        self._by_flat: dict[int, Source] = {}
        self._groups: list[dict[str, Any]] = self.param_groups
        self._engine: Any = lambda: None
        self._record = BackwardRecord()
        # of these DeepSpeed makes no partition
        given = (param for group in self.param_groups for param in group["params"])
        self._frozen: list[Tensor] = [param for param in given if not param.requires_grad]

    # --------------------------------------------------------------------------------------- attach

    def attach(self, engine: Any) -> None:
        """Build the inner optimizer on the engine's partitions and listen to its losses. Alike on
        all ranks, once.
        """
        layout = find_layout(engine)
        self._inner = together(self._where, lambda: self._build(layout))
        # what schedulers set since the last step is saved too; what is loaded counts from now on
        self._inner.register_state_dict_pre_hook(lambda _: self._bring_settings())
        self._inner.register_load_state_dict_post_hook(lambda _: self._settings_follow())
        self._layout = layout
        self._by_flat = {id(source.flat): source for source in layout.sources}
        self._groups = self.param_groups
        self._engine = weakref.ref(engine)
        self._record.listen(engine, layout, losses=self._inner.rule.needs_loss)

    def _build(self, layout: Layout) -> LearnedOptimizer:
        groups: list[dict[str, Any]] = [
            {**{key: value for key, value in group.items() if key != "params"}, "params": []}
            for group in self.param_groups
        ]
        originals: list[tuple[str, Tensor]] = []
        for _, source, member in layout.members():
            groups[source.group]["params"].append((member.fqn, member.piece))
            originals.append((member.fqn, member.param))
        check_groups(groups)
        kwargs = self.face.before_sharding(originals, self._kwargs)
        # the ranks that average gradients average the loss
        kwargs = {**kwargs, "process_group": layout.group if layout.group is not None else False}
        with warnings.catch_warnings():
            # it was said of the JSON; by now the groups have what a schedule made of it
            warnings.simplefilter("ignore", LearningRateWarning)
            return self.face(groups, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, until it is attached: DeepSpeed partitions what it has been given then.

        Raises:
            ValueError: it is attached; nothing has been changed.
        """
        if self.__dict__.get("_inner") is not None:
            raise ValueError(
                "add_param_group: DeepSpeed has made its partitions, and a parameter that comes "
                "later would be in none; give deepspeed.initialize all parameters, each trainable, "
                "and freeze after it those that are to wait"
            )
        super().add_param_group(param_group)

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
        self._record.set_loss(loss)

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
        self._opt_called = True  # which schedulers of torch look at
        last: Source | None = None
        for group in self.param_groups:
            for flat in group["params"]:
                last = self._by_flat.get(id(flat))
                if last is None:  # frozen, stage 0
                    continue
                # left by a step that broke off between two calls
                if last.grad is not None and not last.is_whole:
                    self._layout.forget_gradients()
                last.grad = flat.grad
        if not all(source.grad is not None or source.is_whole for source in self._layout.sources):
            return
        try:
            self._bring_gradients()
            self._bring_settings()
            if problem := self._unfrozen():
                self._inner.fail_next_step(problem)
            if self._inner.rule.needs_loss:
                loss = self._record.loss
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
            self._record.forget()
            for source in self._layout.cut:
                for member in source.members:
                    member.piece.grad = None
        for source in self._layout.sources:
            if source is not last and source.publish is not None:
                source.publish()

    def _bring_gradients(self) -> None:
        """The gradients of the pieces are views of the flat ones; a parameter that backward left
        out has none.
        """
        present = self._record.present
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
        for source in self._layout.cut:
            source.follow()
            assert source.grad is not None
            for member in source.members:
                member.piece.grad = member.part_of(source.grad)
                binding = bound_shard(member.piece)
                assert binding is not None
                binding.present = member.fqn in present

    def _unfrozen(self) -> ValueError | None:
        """What is wrong with a step if a parameter is to be trained that is in no partition."""
        for param in self._frozen:
            if param.requires_grad or param.grad is not None:
                engine = self._engine()
                fqn = "a parameter" if engine is None else repr(engine.param_names[param])
                return ValueError(
                    f"{fqn} was frozen when DeepSpeed made its partitions, and is trainable or has "
                    "a gradient now, which DeepSpeed does not bring here: call "
                    "deepspeed.initialize while it is trainable and freeze it after that, or "
                    "initialize again"
                )
        return None

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
        # ds_to_universal looks for Adam's moments in entry 0, and without an entry takes the
        # model's rounded parameters for the float32 ones, in silence
        state: dict[str, Any] = {"state": {0: {}}, "param_groups": groups}
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
        if not isinstance(saved, dict) or not isinstance(saved.get("layout"), dict):
            raise ValueError(
                f"the checkpoint has no layout under {STATE_KEY!r} in its optimizer: it was not "
                f"saved by {self.face.__name__}"
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
        lie: number of the flat tensor, offset in it.
        """
        order = {
            id(p): i
            for i, p in enumerate(p for group in self.inner.param_groups for p in group["params"])
        }
        pieces: list[list[Any]] = [[]] * len(order)
        for number, source, member in self._layout.members():
            shard, place = member.shard, [-1, 0] if source.is_whole else [number, member.offset]
            what = [shard.fqn, list(shard.shape), shard.start, shard.numel]
            pieces[order[id(member.piece)]] = [*what, *place]
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


# schedulers of torch wrap a `step` that is not marked, to set `_opt_called`
DeepSpeedOptimizer.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def _to_plain(value: Tensor) -> Any:
    """State as torch.save can write it: of a piece its local elements, and of what ranks keep
    beside elements the shape.
    """
    if not isinstance(value, ShardedState):
        return value
    shape = {"shape": list(value.shard.shape)} if value.beside_elements else {}
    return {"local": value.local, "copies": list(value.copies), **shape}


def _from_plain(value: Any, shard: TensorShard) -> Tensor:
    if not isinstance(value, dict):
        plain: Tensor = value
        return plain
    local, copies, shape = value["local"], tuple(value["copies"]), value.get("shape")
    if shape is None:
        return ShardedState(local, copies, shard)
    part = TensorShard.interval(shard.fqn, tuple(shape), 0, local.shape[-1])
    return ShardedState(local, copies, part, beside_elements=True)

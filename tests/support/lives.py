"""What happens to parameters between steps (frozen, unfrozen, exchanged, ...), in every layout. Run
by the ranks of tests/optimizer/test_life.py, and compared there.

Parameters enter the loss linearly, with integers over a power of two, and half of the ranks see the
mean plus what the others see less: gradients are the same in every layout to the bit.
"""

from __future__ import annotations

import functools
import gc
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import pylo_dist
from support.dtensors import local
from support.optimizers import Roles, cases
from support.sharded_model import whole

PARTS = ("first", "late", "head")
HALVES = (PARTS[:1], PARTS[1:])  # of two optimizers
STEPS, MANY = 3, 20
ROLES = Roles(widths={"first.weight": 4.0, "head.weight": 2.0}, embedding="^head")
RULES = cases(ROLES, built_in=True)
Params = dict[str, nn.Parameter]


def _numbers(*key: Any, shape: tuple[int, ...]) -> Tensor:
    seed = sum(ord(c) * (i + 1) for i, c in enumerate(repr(key)))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-16, 17, shape, generator=generator) / 16.0


class Net(nn.Module):
    """`model(step, rank)` has a given loss and given gradients. Two ranks cannot halve all of it.

    Args:
        parts: which of its layers it has; they are the same whichever the others.
    """

    def __init__(self, parts: tuple[str, ...] = PARTS) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"first": (6, 4), "late": (4, 6), "head": (5, 3)}
        layers = {name: nn.Linear(*size) for name, size in sizes.items()}
        for name in parts:
            self.add_module(name, layers[name])

    def forward(self, step: int, rank: int | None) -> Tensor:
        sign = 0.0 if rank is None else 1.0 if rank % 2 else -1.0
        total = torch.zeros(())
        for name, layer in self.named_children():
            x = _numbers("x", name, step, shape=(3, layer.in_features))  # type: ignore[arg-type]
            out = layer(x)
            c = _numbers("c", name, step, shape=tuple(out.shape))
            total = total + (out * (c + sign * _numbers(name, step, shape=c.shape))).sum()
        return 3.0 - 0.0625 * step + 0.125 * sign + (total - total.detach())


# ------------------------------------------------------------------------------------------- lives


def _set(params: Params, prefix: str, trainable: bool) -> None:
    for name, param in params.items():
        if name.startswith(prefix):
            param.requires_grad_(trainable)


def _frozen_late(step: int, when: str, params: Params) -> None:
    if (step, when) == (1, "before"):
        _set(params, "late", False)


def _unfrozen_late(step: int, when: str, params: Params) -> None:
    """Frozen after the optimizer was built."""
    if (step, when) == (0, "before"):
        _set(params, "late", False)
    if (step, when) == (1, "before"):
        _set(params, "late", True)


def _built_frozen(step: int, when: str, params: Params) -> None:
    """Before the model is wrapped or sharded."""
    if when == "built":
        _set(params, "late", False)
    if (step, when) == (1, "before"):
        _set(params, "late", True)


def _added(step: int, when: str, params: Params) -> None:
    """Frozen when the optimizer is built, which does not get it before it is unfrozen."""
    if when == "wrapped":
        _set(params, "late", False)
    if (step, when) == (1, "before"):
        _set(params, "late", True)


def _switched(step: int, when: str, params: Params) -> None:
    """As a GAN's loop: each half is frozen in every other pass, and both are between backward and
    step.
    """
    if when in ("before", "after"):
        _set(params, "", when == "before")
    if when == "before":
        _set(params, ("first", "late")[step % 2], False)


def _exchanged(step: int, when: str, params: Params) -> None:
    """Values of an average are put in and taken out again, as for an evaluation."""
    if (step, when) == (1, "before"):
        for param in params.values():
            kept = param.data
            param.data = torch.full_like(kept, 0.5)
            param.data = kept


def _nothing(step: int, when: str, params: Params) -> None:
    """What happens does not happen to parameters."""


def _toggled(step: int, when: str, params: Params) -> None:
    """Each at random, before backward and after it."""
    if when not in ("before", "after"):
        return
    generator = torch.Generator().manual_seed(10 * step + len(when))
    for param, number in zip(params.values(), torch.rand(6, generator=generator), strict=True):
        param.requires_grad_(bool(number < 0.6))
    if when == "before":  # backward needs one
        list(params.values())[step % 6].requires_grad_(True)


LIVES: dict[str, Callable[[int, str, Params], None]] = {
    "frozen late": _frozen_late,
    "unfrozen late": _unfrozen_late,
    "built frozen": _built_frozen,
    "added late": _added,
    "switched": _switched,
    "exchanged": _exchanged,
    "two optimizers": _nothing,
    "changed lr": _nothing,
    "toggled": _toggled,
}


# ----------------------------------------------------------------------------------------- layouts


@dataclass
class Run:
    """A model in a layout with what optimizes it.

    Attributes:
        params: of the whole model, by name.
        optimizers: their `param_groups` take a new lr.
        advance: one forward and backward pass, `between`, and the optimizers' steps.
        values: this rank's part of the values; wholes: the whole ones, on all ranks.
        close: gives back what it holds.
    """

    params: Params
    optimizers: list[Any]
    advance: Callable[[int, Callable[[], None]], None]
    values: Callable[[], list[Tensor]]
    wholes: Callable[[], dict[str, Tensor]]
    close: Callable[[], None] = lambda: None


@functools.cache
def _mesh(*sizes: int) -> Any:
    """Of all ranks; made once, since it makes process groups."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])


def _wrap(layout: str, model: Net) -> tuple[nn.Module, int | None]:
    """What is called, and this rank's place among those that see other data."""
    world = dist.get_world_size()
    if layout == "plain":
        return model, None
    if layout == "ddp":
        ddp = DistributedDataParallel(model, find_unused_parameters=True)
        return ddp, dist.get_rank()
    if layout == "tp":
        plan = {
            "first": ColwiseParallel(output_layouts=Replicate()),
            "late": RowwiseParallel(input_layouts=Replicate()),
        }
        parallelize_module(model, _mesh(world), plan)  # type: ignore[arg-type]
        return model, None
    if layout == "fsdp2":
        fully_shard(model, mesh=_mesh(world))
    if layout == "hsdp":
        fully_shard(model, mesh=_mesh(2, world // 2))
    return model, dist.get_rank()


def build(layout: str, kind: str, life: str, files: dict[str, str]) -> Run:
    if layout.startswith("deepspeed"):
        return _deepspeed(int(layout[-1]), kind, life, files)
    face, arguments = RULES[kind].face, dict(RULES[kind].arguments)
    model, change = Net(), LIVES[life]
    change(0, "built", dict(model.named_parameters()))
    called, place = _wrap(layout, model)
    params = dict(model.named_parameters())
    change(0, "wrapped", params)

    def optimizer(names: list[str]) -> Any:
        kwargs = dict(arguments)
        if "width_mults" in kwargs:
            kwargs["width_mults"] = {n: w for n, w in kwargs["width_mults"].items() if n in names}
        given = [(name, params[name]) for name in names]
        if layout.startswith("zero"):
            return pylo_dist.ZeroOptimizer(given, face, stage=int(layout[-1]), **kwargs)
        return face(given, **kwargs, **({"process_group": False} if layout == "plain" else {}))

    late = [name for name in params if name.startswith("late")]
    parts = HALVES if life == "two optimizers" else (PARTS,)
    given = [[name for name in params if name.split(".")[0] in part] for part in parts]
    if life == "added late":
        given = [[name for name in params if name not in late]]
    optimizers = [optimizer(names) for names in given]

    def advance(step: int, between: Callable[[], None]) -> None:
        if (life, step) == ("added late", 1):
            optimizers[0].add_param_group({"params": [(name, params[name]) for name in late]})
        for one in optimizers:
            one.zero_grad()
        model.zero_grad()  # of those that no optimizer has yet
        loss = called(step, place)
        loss.backward()
        between()
        for one in optimizers:
            one.step(loss.detach())

    return Run(
        params,
        optimizers,
        advance,
        lambda: [local(param).clone() for param in params.values()],
        lambda: {name: whole(param) for name, param in params.items()},
    )


def _deepspeed(stage: int, kind: str, life: str, files: dict[str, str]) -> Run:
    """Two optimizers are two engines, each with its half of the model."""
    from support import deepspeed_cases

    deepspeed = deepspeed_cases.import_deepspeed()
    arguments = {
        key: value
        for key, value in RULES[kind].arguments.items()
        if key not in (*deepspeed_cases.CLIPPING, "weights")
    }
    engines, change = [], LIVES[life]
    for part in HALVES if life == "two optimizers" else (PARTS,):
        model = Net(part)
        params = dict(model.named_parameters())
        for when in ("built", "wrapped"):
            change(0, when, params)
        kwargs = {**arguments, "weights": files[kind]}
        if "width_mults" in kwargs:
            kwargs["width_mults"] = {n: w for n, w in kwargs["width_mults"].items() if n in params}
        given = [p for name, p in params.items() if life != "added late" or "late" not in name]
        json = {
            "optimizer": {"type": RULES[kind].face.__name__, "params": kwargs},
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }
        engines.append(deepspeed.initialize(model=model, model_parameters=given, config=json)[0])
    params = {n: p for engine in engines for n, p in engine.module.named_parameters()}

    def advance(step: int, between: Callable[[], None]) -> None:
        if (life, step) == ("added late", 1):
            late = [param for name, param in params.items() if name.startswith("late")]
            engines[0].basic_optimizer.add_param_group({"params": late})
        for engine in engines:
            engine.backward(engine(step, dist.get_rank()))
        between()
        for engine in engines:
            engine.step()

    def values() -> list[Tensor]:
        return [
            member.piece.detach().clone()
            for engine in engines
            for _, _, member in engine.basic_optimizer.layout.members()
        ]

    def wholes() -> dict[str, Tensor]:
        with deepspeed.zero.GatheredParameters(list(params.values()), enabled=stage == 3):
            return {name: param.detach().clone() for name, param in params.items()}

    def close() -> None:
        for engine in engines:
            engine.destroy()

    return Run(
        params,
        [engine.basic_optimizer for engine in engines],
        advance,
        values,
        wholes,
        close,
    )


# -------------------------------------------------------------------------------------------- runs


@dataclass
class Outcome:
    """What became of a run.

    Attributes:
        history: of one process the whole values at first and after each step; else the last alone.
        refused: what a step said that was not taken; "" where all were.
        unchanged: whether a refused step left all values as they were.
    """

    history: list[dict[str, Tensor]]
    refused: str = ""
    unchanged: bool = True


def live(layout: str, kind: str, life: str, files: dict[str, str]) -> Outcome:
    """Take all steps of a life, or as many as are not refused; alike on all ranks."""
    run, change = build(layout, kind, life, files), LIVES[life]
    history = [run.wholes()] if layout == "plain" else []
    for step in range(MANY if life == "toggled" else STEPS):
        change(step, "before", run.params)
        if life == "changed lr":
            for group in (g for optimizer in run.optimizers for g in optimizer.param_groups):
                group["lr"] = group["lr"] * (0.5 if step % 2 else 3.0)
        before = run.values()
        try:
            run.advance(step, lambda at=step: change(at, "after", run.params))  # type: ignore[misc]
        except (ValueError, pylo_dist.PeerError) as error:
            same = all(torch.equal(a, b) for a, b in zip(before, run.values(), strict=True))
            run.close()
            return Outcome([], f"{type(error).__name__}: {error}", same)
        if layout == "plain":
            history.append(run.wholes())
    history = history or [run.wholes()]
    run.close()
    return Outcome(history)


def live_all(
    rank: int, world: int, layouts: dict[str, tuple[str, ...]], files: dict[str, str]
) -> dict[tuple[str, str, str], Outcome]:
    """The outcome of every life, by layout, rule and life.

    Args:
        layouts: each with its rules; those of one process are dealt out to the ranks. Under random
            toggling all rules run wherever that is cheap.
    """
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layout, rules in layouts.items():
            gc.freeze()  # DeepSpeed collects garbage whenever it makes an engine
            kinds = tuple(RULES)[rank::world] if layout == "plain" else tuple(RULES)
            for kind, life in itertools.product(kinds, LIVES):
                if kind in rules or (life == "toggled" and not layout.startswith("deepspeed")):
                    found[layout, kind, life] = live(layout, kind, life, files)
        dist.barrier()
    return found

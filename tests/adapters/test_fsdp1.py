"""torch's FullyShardedDataParallel (FSDP1): every optimizer takes the steps of one process, its
checkpoints are those of other layouts, and what cannot be served is refused on all ranks.
"""

from __future__ import annotations

import copy
import gc
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffload,
    FullOptimStateDictConfig,
    FullStateDictConfig,
    MixedPrecision,
    OptimStateKeyType,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import pylo_dist
from pylo_dist.layouts import fsdp1
from pylo_dist.testing import largest_changes, layout_error
from support.collectives import Collectives
from support.optimizers import small_fc
from support.ranks import run_ranks
from support.sharded_model import (
    SETTINGS,
    STEPS,
    Block,
    Net,
    loss_of,
    mean_gradients,
    trainable,
    unsharded,
    whole,
)

CPU = torch.device("cpu")
SOME = ["AdafacLO", "VeLO_clipped", "CELO2"]
OTHERS = [name for name in SETTINGS if name not in SOME]
FLAT = ", flat"  # use_orig_params=False
STRATEGIES = {
    2: {
        "FULL_SHARD": list(SETTINGS),
        f"FULL_SHARD{FLAT}": list(SETTINGS),
        "SHARD_GRAD_OP": SOME[:1],
        f"SHARD_GRAD_OP{FLAT}": SOME[:1],
        "NO_SHARD": SOME[:1],
        f"NO_SHARD{FLAT}": SOME[:1],
    },
    3: {"FULL_SHARD": SOME, f"FULL_SHARD{FLAT}": [SOME[0], *OTHERS]},
    4: {"HYBRID_SHARD": SOME, f"HYBRID_SHARD{FLAT}": SOME[:2], f"FULL_SHARD{FLAT}": OTHERS},
}
OFFLOADED = CPUOffload(offload_params=True)


def wrapped(net: Net, strategy: str, world: int, *, blocks: bool = True) -> FSDP:
    """A unit per block and one of the rest, without 0-d parameters, which FSDP1 does not take.
    Under SHARD_GRAD_OP blocks compute their activations again.
    """
    options: dict[str, Any] = {}
    strategy, flat = strategy.removesuffix(FLAT), strategy.endswith(FLAT)
    if strategy == "HYBRID_SHARD":
        names = ("replicate", "shard")
        options["device_mesh"] = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=names)
    model = FSDP(
        net,
        auto_wrap_policy=ModuleWrapPolicy({Block}) if blocks else None,
        sharding_strategy=ShardingStrategy[strategy],
        # a flat parameter is trainable as a whole
        ignored_states=net.ignored() | ({net.frozen} if flat else set()),
        use_orig_params=not flat,
        device_id=CPU,
        **options,
    )
    if strategy == "SHARD_GRAD_OP":
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    return model


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Whole values by the names of the parameters before they were wrapped."""
    state = {**model.state_dict()}
    state.pop("head.weight", None)  # tied
    return {fqn: whole(tensor) for fqn, tensor in state.items()}


def train(model: nn.Module, optimizer: Any, rank: int, first: int, last: int) -> None:
    for step in range(first, last):
        model.zero_grad()
        model(step, rank).backward()
        optimizer.step(torch.tensor(loss_of(step, rank)))


def run(name: str, strategy: str, rank: int, world: int) -> dict[str, Any]:
    model = wrapped(Net(), strategy, world)
    # of flat parameters, names are those of the tensors in them, whether they are given or not
    given = [p for _, p in trainable(model)] if strategy.endswith(FLAT) else trainable(model)
    optimizer = SETTINGS[name].build(given)
    train(model, optimizer, rank, 0, STEPS - 1)
    with Collectives() as calls:
        train(model, optimizer, rank, STEPS - 1, STEPS)
    own = dict(calls.counts)
    return {
        "params": snapshot(model),
        "all_reduces": own.get("allreduce_", 0),
        "norm": float(optimizer.grad_norm),
        "names": [row["fqn"] for row in optimizer.report()],
    }


def any_to_any(rank: int, world: int, folder: str) -> dict[str, dict[str, Tensor]]:
    """Steps, a checkpoint, further steps; the same from that checkpoint in other layouts."""
    case = SETTINGS["VeLO_clipped"]

    def built(layout: str) -> tuple[nn.Module, Any]:
        net = Net()
        del net.blocks[0].odd.unused  # which FSDP1 alone gives a gradient
        if layout == "zero2":
            return net, pylo_dist.ZeroOptimizer(net, case.face, stage=2, **case.arguments)
        if layout == "fsdp2":
            fully_shard(net, ignored_params=net.ignored())
            return net, case.build(trainable(net))
        model = wrapped(net, layout, world)
        return model, case.build(trainable(model))

    model, optimizer = built("FULL_SHARD")
    train(model, optimizer, rank, 0, 3)
    pylo_dist.checkpoint.save(folder, {"model": model, "optimizer": optimizer})
    gathered = pylo_dist.full_state_dict(optimizer)
    train(model, optimizer, rank, 3, 6)
    results = {"straight": snapshot(model)}
    for layout in LOADED:
        model, optimizer = built(layout)
        pylo_dist.checkpoint.load(folder, {"model": model, "optimizer": optimizer})
        again = pylo_dist.full_state_dict(optimizer)
        for i, entries in gathered.get("state", {}).items():  # {} but on the first rank
            assert all(torch.equal(t, again["state"][i][key]) for key, t in entries.items())
        train(model, optimizer, rank, 3, 6)
        results[layout] = snapshot(model)
    for layout in LOADED[-1:1:-1]:  # each is loaded from the one before
        pylo_dist.checkpoint.save(f"{folder}_{layout}", {"model": model, "optimizer": optimizer})
        model, optimizer = built(layout)
        pylo_dist.checkpoint.load(f"{folder}_{layout}", {"model": model, "optimizer": optimizer})
        results[f"back in {layout}"] = snapshot(model)
    return results


LOADED = ("FULL_SHARD", "SHARD_GRAD_OP", f"FULL_SHARD{FLAT}", f"NO_SHARD{FLAT}", "fsdp2", "zero2")


def states(rank: int, world: int, folder: str) -> dict[str, Any]:
    """torch's functions for states of optimizers: what they give, and what a step is worth after
    them.
    """
    case, found = SETTINGS["VeLO_clipped"], {}
    first = FullOptimStateDictConfig(offload_to_cpu=True, rank0_only=True)

    def built(layout: str, *, blocks: bool = True) -> tuple[FSDP, Any]:
        model = wrapped(Net(), layout, world, blocks=blocks)
        named = trainable(model)  # two groups, and not in the model's order
        groups = [{"params": named[1:][::-1], "weight_decay": 0.01}, {"params": named[:1]}]
        return model, case.build(groups)

    def kind(model: FSDP, name: StateDictType) -> Any:
        full = name == StateDictType.FULL_STATE_DICT
        model_config = FullStateDictConfig(rank0_only=True) if full else None
        return FSDP.state_dict_type(model, name, model_config, first if full else None)

    def gone_on(model: FSDP, optimizer: Any) -> dict[str, Tensor]:
        train(model, optimizer, rank, 2, 4)
        return snapshot(model)

    for layout, other in (
        ("FULL_SHARD", f"FULL_SHARD{FLAT}"),
        (f"FULL_SHARD{FLAT}", "FULL_SHARD"),
        (f"NO_SHARD{FLAT}", "SHARD_GRAD_OP"),
    ):
        model, optimizer = built(layout)
        train(model, optimizer, rank, 0, 2)
        values = {fqn: tensor.clone() for fqn, tensor in model.state_dict().items()}
        full = FSDP.optim_state_dict(model, optimizer)
        mine = pylo_dist.full_state_dict(optimizer, rank0_only=False)
        names = [name for group in mine["param_groups"] for name in group["param_names"]]
        equal = all(
            torch.equal(tensor, full["state"][names[i]][key])
            for i, entries in mine["state"].items()
            for key, tensor in entries.items()
        )
        found[f"{layout}, equal"] = equal and sorted(full["state"]) == sorted(names)
        own = optimizer.state_dict()
        del own["param_groups"]
        alone = FSDP.optim_state_dict(model, optimizer, own)
        found[f"{layout}, without groups"] = list(alone) == ["state"] and all(
            torch.equal(tensor, full["state"][fqn][key])
            for fqn, entries in alone["state"].items()
            for key, tensor in entries.items()
        )
        with kind(model, StateDictType.FULL_STATE_DICT):
            on_first = FSDP.optim_state_dict(model, optimizer)
        found[f"{layout}, of the first rank"] = bool(on_first) == (rank == 0)
        with kind(model, StateDictType.SHARDED_STATE_DICT):
            in_parts = FSDP.optim_state_dict(model, optimizer)
        place = f"{folder}_{layout}"
        dcp.save({"optimizer": in_parts}, checkpoint_id=place)
        found[f"{layout}, straight"] = gone_on(model, optimizer)
        for how in ("whole", "first rank", "sharded", "in one unit", "renamed", "older", "oldest"):
            if how == "in one unit" and other.endswith(FLAT):
                continue  # of one flat parameter there are no two groups
            model, optimizer = built(other, blocks=how != "in one unit")
            with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT):
                model.load_state_dict(values)
            if how == "first rank":
                with kind(model, StateDictType.FULL_STATE_DICT):
                    state = FSDP.optim_state_dict_to_load(model, optimizer, on_first)
            elif how == "sharded":
                with kind(model, StateDictType.SHARDED_STATE_DICT):
                    sharded = FSDP.optim_state_dict(model, optimizer)
                    dcp.load({"optimizer": sharded}, checkpoint_id=place)
                    state = FSDP.optim_state_dict_to_load(model, optimizer, sharded)
            elif how == "in one unit":
                state = FSDP.flatten_sharded_optim_state_dict(in_parts, model, optimizer)
            elif how == "renamed" and not other.endswith(FLAT):
                numbered = FSDP.rekey_optim_state_dict(full, OptimStateKeyType.PARAM_ID, model)
                named = FSDP.rekey_optim_state_dict(numbered, OptimStateKeyType.PARAM_NAME, model)
                state = FSDP.optim_state_dict_to_load(model, optimizer, named)
            elif how == "older":
                state = FSDP.scatter_full_optim_state_dict(on_first, model, optim=optimizer)
            elif how == "oldest":  # which has no argument for the optimizer
                case.build(trainable(model))  # that nobody keeps, and one rank has collected
                if rank == 0:
                    gc.collect()
                state = FSDP.shard_full_optim_state_dict(full, model)
            else:
                state = FSDP.optim_state_dict_to_load(model, optimizer, full)
            optimizer.load_state_dict(state)
            found[f"{layout}, {how}"] = gone_on(model, optimizer)
    model, optimizer = built("FULL_SHARD")
    options = StateDictOptions(full_state_dict=True)
    train(model, optimizer, rank, 0, 2)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    values = {fqn: tensor.clone() for fqn, tensor in model.state_dict().items()}
    model, optimizer = built("FULL_SHARD")
    # which takes a step of zeros, before the first pass
    set_optimizer_state_dict(model, optimizer, state, options=options)
    model.load_state_dict(values)
    found["FULL_SHARD, set_optimizer_state_dict"] = gone_on(model, optimizer)
    adam = torch.optim.Adam(model.parameters())  # goes on to torch's own
    train(model, Stepping(adam), rank, 4, 5)
    found["Adam"] = sorted(FSDP.optim_state_dict(model, adam)["state"]["embedding.weight"])
    return found


class Stepping:
    """One of torch's optimizers, which take no loss."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, loss: Tensor) -> None:
        self.optimizer.step()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.second(torch.tanh(self.first(x))).square().sum()
        return total


def small(**options: Any) -> FSDP:
    """A unit per layer."""
    options = {"use_orig_params": True, **options}
    return FSDP(Small(), device_id=CPU, auto_wrap_policy=ModuleWrapPolicy({nn.Linear}), **options)


def adafac(params: Any, **kwargs: Any) -> pylo_dist.AdafacLO:
    return pylo_dist.AdafacLO(params, weights=small_fc(), **kwargs)


def batch(rank: int, part: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * rank + part)
    return torch.randn(4, 5, generator=generator)


def habits(rank: int, world: int) -> dict[str, Tensor]:
    """What training loops do, beside one process: parameters after three steps."""
    results = {}

    def three(name: str, model: nn.Module, backward: Callable[[Any], None], **kwargs: Any) -> None:
        named = list(model.named_parameters())
        groups: list[dict[str, Any]] = [
            {"params": [(n, p) for n, p in named if "second" in n], "weight_decay": 0.001},
            {"params": [(n, p) for n, p in named if "second" not in n]},
        ]
        optimizer = adafac(groups, **kwargs)
        scaler = ShardedGradScaler("cpu", init_scale=4.0, enabled=name.startswith("scaled"))
        pieces = [p for group in optimizer.param_groups for p in group["params"]]
        for step in range(3):
            if name.startswith("frozen"):
                for n, p in model.named_parameters():
                    p.requires_grad_("first" not in n or step != 1)
            optimizer.zero_grad(set_to_none=not name.startswith("zeros"))
            backward(scaler.scale)
            if name.startswith("evaluated"):  # which leaves the root gathered
                with torch.no_grad():
                    model(batch(5))
            if name.startswith("clipped by hand"):
                pylo_dist.clip_grad_norm_(optimizer, 0.5)
            if name.startswith("clipped by its parameters"):
                pylo_dist.clip_grad_norm_(model.parameters(), 0.5)
            if name.startswith("one left out"):
                pieces[step].grad = None
                assert pieces[step].grad is None
            if name.startswith("one given"):
                grad = torch.full_like(pieces[step].data, 0.25)
                for p in pieces:
                    p.grad = None
                pieces[step].grad = grad
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        results[name] = torch.cat([p.reshape(-1) for p in snapshot(model).values()])

    def micro_batches(model: FSDP, sync: bool) -> None:
        if sync:
            (model(batch(rank, 0)) / 2).backward()
        else:
            with model.no_sync():
                (model(batch(rank, 0)) / 2).backward()
        (model(batch(rank, 1)) / 2).backward()

    def mean_of_all(model: nn.Module, parts: int) -> None:
        (
            sum(model(batch(r, i)) for r in range(world) for i in range(parts)) / world / parts
        ).backward()

    for name, parts, kwargs in (
        ("clipped", 1, {"max_grad_norm": 0.5}),
        ("clipped by hand", 1, {}),
        ("clipped by its parameters", 1, {}),
        ("frozen", 1, {}),
        ("zeros", 1, {}),
        ("scaled", 1, {}),
        ("one left out", 1, {}),
        ("one given", 1, {}),
        ("evaluated", 1, {}),
        ("accumulated", 2, {}),
        ("accumulated without sync", 2, {}),
    ):
        for ending, orig in (("", True), (FLAT, False)):
            model = small(use_orig_params=orig)
            if parts == 1:
                three(
                    name + ending,
                    model,
                    lambda scale, m=model: scale(m(batch(rank))).backward(),
                    **kwargs,
                )
            else:
                sync = "without" not in name
                three(name + ending, model, lambda _, m=model, s=sync: micro_batches(m, s))
        alone = Small()
        three(
            f"{name.replace('scaled', 'unscaled')}, alone",
            alone,
            lambda _, m=alone, n=parts: mean_of_all(m, n),
            process_group=False,
            **kwargs,
        )
    results["scaled, alone"] = results.pop("unscaled, alone")
    bfloat16 = {"param_dtype": torch.bfloat16}
    for name, options in (
        ("bfloat16", {"mixed_precision": MixedPrecision(**bfloat16)}),
        ("kept", {"mixed_precision": MixedPrecision(**bfloat16, keep_low_precision_grads=True)}),
        ("summed", {"mixed_precision": MixedPrecision(**bfloat16, reduce_dtype=torch.float32)}),
    ):
        for ending, orig in (("", True), (FLAT, False)):
            model = small(use_orig_params=orig, **options)
            three(name + ending, model, lambda _, m=model: m(batch(rank)).backward())
    for name, options in (("offloaded", {"cpu_offload": OFFLOADED}), ("on the device", {})):
        with pinned():
            model = small(use_orig_params=False, **options)
            three(name, model, lambda _, m=model: m(batch(rank)).backward())
    return results


@contextmanager
def pinned() -> Iterator[None]:
    """Pinned memory, elsewhere than what is pinned, and a stream that can be waited for, without an
    accelerator, which torch's CPUOffload takes for granted.
    """
    before = Tensor.pin_memory
    Tensor.pin_memory = lambda tensor: tensor.clone()  # type: ignore
    torch.cpu.Stream.synchronize = lambda stream: None  # type: ignore
    try:
        yield
    finally:
        Tensor.pin_memory = before  # type: ignore
        del torch.cpu.Stream.synchronize  # type: ignore


def refused(rank: int, world: int) -> dict[str, tuple[str, float]]:
    """What is refused, with how long it took: nobody waits for the timeout of the group."""

    def built_before(orig: bool = True) -> None:
        model = Small()
        optimizer = adafac(model.named_parameters())
        sharded = FSDP(model, use_orig_params=orig, device_id=CPU)
        sharded(batch(rank)).backward()
        optimizer.step()

    def built_before_flat() -> None:
        built_before(orig=False)

    def torch_clips() -> None:
        model = small(use_orig_params=False)
        optimizer = adafac(model.parameters())
        model(batch(rank)).backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)

    def copied_flat() -> None:
        model = small(use_orig_params=False)
        copy.deepcopy(adafac(model.parameters()).param_groups)

    def wrong_gradient() -> None:
        model = small(use_orig_params=False)
        optimizer = adafac(model.parameters())
        optimizer.param_groups[0]["params"][0].grad = torch.zeros(3, 3, 3)

    def channels_last() -> None:
        conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore
        model = FSDP(conv, use_orig_params=True, device_id=CPU)
        adafac(model.parameters())

    def channels_last_flat() -> None:
        conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore
        model = FSDP(conv, use_orig_params=False, device_id=CPU)
        adafac(model.parameters())

    def other_model() -> None:
        model, other = small(), small()
        FSDP.optim_state_dict(other, adafac(model.parameters()))

    def another_shape() -> None:
        model = small()
        optimizer = adafac(model.named_parameters())
        state = FSDP.optim_state_dict(model, optimizer)
        entries = state["state"]["first.weight"]
        key = next(iter(entries))
        entries[key] = torch.zeros(2, 2)
        optimizer.load_state_dict(FSDP.optim_state_dict_to_load(model, optimizer, state))

    def unknown_to_torch() -> None:
        model = small(use_orig_params=False)
        optimizer = adafac(model.parameters())
        state = get_optimizer_state_dict(model, optimizer)
        set_optimizer_state_dict(model, optimizer, state)

    def zero_flat() -> None:
        model = small(use_orig_params=False)
        pylo_dist.ZeroOptimizer(model.named_parameters(), pylo_dist.AdafacLO, weights=small_fc())

    def zero() -> None:
        model = small()
        pylo_dist.ZeroOptimizer(model.named_parameters(), pylo_dist.AdafacLO, weights=small_fc())

    def shard() -> None:
        pylo_dist.shard(small(), pylo_dist.AdafacLO, weights=small_fc())

    def one_fails() -> None:
        model = small()
        pylo_dist.AdafacLO(model.named_parameters(), weights="/nowhere" if rank else small_fc())

    def unlike() -> None:
        model = small()
        adafac(model.named_parameters(), max_grad_norm=1.0 + rank)

    def gone() -> None:
        model = FSDP(Small(), use_orig_params=True, device_id=CPU)
        params = list(model.named_parameters())
        del model
        adafac(params)

    def gone_on_one(**options: Any) -> None:
        model = small(**options)
        params = list(model.named_parameters())
        del model
        if rank:
            gc.collect()
        adafac(params)

    def gone_on_one_flat() -> None:
        gone_on_one(use_orig_params=False)

    def collected_meanwhile() -> None:
        describe = fsdp1.describe

        def collecting(*args: Any) -> Any:
            if rank:
                gc.collect()
            return describe(*args)

        fsdp1.describe = collecting
        try:
            adafac(list(small().named_parameters()))  # nobody else keeps the model
        finally:
            fsdp1.describe = describe

    def summoned() -> None:
        model = small()
        with FSDP.summon_full_params(model):
            adafac(model.named_parameters())

    def stepped_in_summoned() -> None:
        model = small(use_orig_params=False)
        optimizer = adafac(model.parameters())
        with FSDP.summon_full_params(model):
            optimizer.step()

    def without_sync(orig: bool = True) -> None:
        model = small(use_orig_params=orig)
        optimizer = adafac(model.parameters())
        with model.no_sync():
            model(batch(rank)).backward()
        optimizer.step()

    def without_sync_flat() -> None:
        without_sync(orig=False)

    def beside_fsdp2() -> None:
        model, other = small(), nn.Linear(4, 4)
        fully_shard(other)
        adafac([*other.named_parameters(), *model.named_parameters()])

    def copied() -> None:
        model = small()
        copy.deepcopy(adafac(model.named_parameters()))

    def other_torch() -> None:
        model = small()
        place, fsdp1._NAMES["handle"] = fsdp1._NAMES["handle"], "_no_such_name"
        try:
            adafac(model.named_parameters())
        finally:
            fsdp1._NAMES["handle"] = place

    found = {}
    for action in (
        built_before, built_before_flat, torch_clips, copied_flat, wrong_gradient,
        channels_last, channels_last_flat, other_model, another_shape, unknown_to_torch,
        zero_flat, zero, shard, one_fails, unlike,
        gone, gone_on_one, gone_on_one_flat, collected_meanwhile, summoned, stepped_in_summoned,
        without_sync, without_sync_flat, beside_fsdp2, copied, other_torch,
    ):  # fmt: skip
        begin = time.monotonic()
        try:
            action()
            text = "nothing was refused"
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        found[action.__name__] = text, time.monotonic() - begin
    return found


REFUSALS = {
    "built_before": r"ValueError: .*'first.weight' has shape \(\d+,\) now.*build it after",
    "built_before_flat": r"ValueError: 'first.weight' and all .*flat parameters now; build the",
    "torch_clips": r"ValueError: .*clip_grad_norm_.*pieces",
    "copied_flat": r"TypeError: a piece of a flat parameter",
    "wrong_gradient": r"ValueError: a gradient of shape \(3, 3, 3\)",
    "channels_last": r"ValueError: '.*' was not contiguous",
    "channels_last_flat": r"ValueError: 'weight' was not contiguous",
    "other_model": r"ValueError: .*no parameter of the model",
    "another_shape": r"ValueError: state '.*' of 'first.weight': found shape \(2, 2\)",
    "unknown_to_torch": r"KeyError: .*optim_state_dict_to_load",
    "zero_flat": r"ValueError: '.*' is a flat parameter.*use_orig_params=True",
    "zero": r"ValueError: '.*first.*weight'.*FullyShardedDataParallel.*sharded already",
    "shard": r"ValueError: the model is wrapped in FullyShardedDataParallel",
    "one_fails": r"/nowhere",
    "unlike": r"ValueError: the ranks disagree.*max_grad_norm",
    "gone": r"ValueError: .*FullyShardedDataParallel module that is gone",
    "gone_on_one": r": .*FullyShardedDataParallel module that is gone",
    "gone_on_one_flat": r": .*FullyShardedDataParallel module that is gone",
    "collected_meanwhile": r"nothing was refused",
    "summoned": r"ValueError: .*summon_full_params",
    "stepped_in_summoned": r"ValueError: '.*' is inside of summon_full_params",
    "without_sync": r"ValueError: .*gradient of '.*' has \d+ elements.*outside of it",
    "without_sync_flat": r"ValueError: .*gradient of '.*' has \d+ elements.*outside of it",
    "beside_fsdp2": r"ValueError: '.*first.weight' belongs to .*FSDP1.*, 'weight' is a DTensor",
    "copied": r"TypeError: '.*first.weight' lies on several ranks: .*cannot be copied or pickled",
    "other_torch": r"ValueError: torch .* has no '_no_such_name'",
}


def ranks_main(rank: int, world: int, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {
        f"{strategy}/{name}": run(name, strategy, rank, world)
        for strategy, names in STRATEGIES[world].items()
        for name in names
    }
    if world == 2:
        results["checkpoints"] = any_to_any(rank, world, f"{folder}/saved")
        results["habits"] = habits(rank, world)
        results["states"] = states(rank, world, f"{folder}/states")
        results["refused"] = refused(rank, world)
    return results


@pytest.fixture(scope="module", params=STRATEGIES)
def results(request: Any, tmp_path_factory: Any) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("fsdp1")
    return run_ranks(request.param, ranks_main, str(folder))


def test_every_strategy_equals_one_process(
    results: list[dict[str, Any]], figures: list[str]
) -> None:
    world = len(results)
    # FSDP1 has zeros where no gradient reached a parameter of a unit
    gradients = [
        {
            fqn: torch.zeros(6, 5) if grad is None and fqn.startswith("blocks") else grad
            for fqn, grad in step.items()
        }
        for step in mean_gradients(world)
    ]
    for strategy, names in STRATEGIES[world].items():
        for name in names:
            key, case = f"{strategy}/{name}", SETTINGS[name]
            history, reference, _ = unsharded(world, gradients, case.face, **case.arguments)
            mine = results[0][key]
            for other in results[1:]:
                for fqn, tensor in mine["params"].items():
                    assert torch.equal(tensor, other[key]["params"][fqn]), (key, fqn)
            share, change = case.share(torch.float32), largest_changes(history)
            errors = layout_error(mine["params"], history[-1], change, share)
            assert max(errors.values()) <= 1.0, (key, errors)
            assert mine["norm"] == pytest.approx(float(reference.grad_norm), rel=1e-6)
            assert mine["names"] == [fqn for fqn, _ in trainable(Net())]
            # gradients of ignored parameters beside the sums of the rule
            copies = strategy.removesuffix(FLAT) in ("NO_SHARD", "HYBRID_SHARD")
            assert mine["all_reduces"] <= case.reductions + 2 + copies * 3, (key, mine)
            figures.append(
                f"fsdp1 | {strategy} on {world} | {name}: {max(errors.values()):.2g} of the layout "
                "tolerance"
            )


def test_checkpoints_are_those_of_other_layouts(results: list[dict[str, Any]]) -> None:
    if "checkpoints" not in results[0]:
        pytest.skip("on two ranks")
    for result in results:
        found = result["checkpoints"]
        for layout in [name for name in found if name != "straight"]:
            for fqn, tensor in found["straight"].items():
                assert torch.equal(found[layout][fqn], tensor), (layout, fqn)


def test_loops_train_as_one_process_does(results: list[dict[str, Any]]) -> None:
    if "habits" not in results[0]:
        pytest.skip("on two ranks")
    for result in results:
        found = result["habits"]
        for name in ("bfloat16", "kept", "summed"):
            assert bool(found[name].isfinite().all())
            assert torch.equal(found[name], found[name + FLAT]), name
        assert torch.equal(found["offloaded"], found["on the device"])
        for name in [name for name in found if f"{name}, alone" in found]:
            # backward on half the batch each: matrix products of other shapes round differently
            torch.testing.assert_close(
                found[name], found[f"{name}, alone"], rtol=1e-4, atol=1e-6, msg=name
            )
            # sums over the flat tensor with its padding, and without
            torch.testing.assert_close(
                found[name], found[name + FLAT], rtol=1e-6, atol=1e-7, msg=name
            )


def test_torchs_functions_for_states_serve_learned_optimizers(
    results: list[dict[str, Any]],
) -> None:
    if "states" not in results[0]:
        pytest.skip("on two ranks")
    for result in results:
        found = result["states"]
        assert found.pop("Adam") == ["exp_avg", "exp_avg_sq", "step"]
        straight: dict[str, Tensor] = {}
        assert len(found) == 3 * (3 + 1 + 7) - 1 + 1, sorted(found)
        for name, value in found.items():
            if name.endswith("straight"):
                straight = value
            elif isinstance(value, bool):
                assert value, name
            else:
                wanted = found["FULL_SHARD, straight"] if "set_" in name else straight
                for fqn, tensor in wanted.items():
                    assert torch.equal(value[fqn], tensor), (name, fqn)


def test_what_cannot_be_served_is_refused_on_all_ranks(results: list[dict[str, Any]]) -> None:
    if "refused" not in results[0]:
        pytest.skip("on two ranks")
    for result in results:
        assert result["refused"].keys() == REFUSALS.keys()
        for name, (text, seconds) in result["refused"].items():
            assert re.search(REFUSALS[name], text), (name, text)
            assert seconds < 20, (name, seconds)

"""torch's FullyShardedDataParallel (FSDP1): every optimizer takes the steps of one process, its
checkpoints are those of other layouts, and what cannot be served is refused on all ranks.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy, fully_shard
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
)

CPU = torch.device("cpu")
SOME = ["AdafacLO", "VeLO_clipped", "CELO2"]
STRATEGIES = {
    2: {"FULL_SHARD": list(SETTINGS), "SHARD_GRAD_OP": SOME[:1], "NO_SHARD": SOME[:1]},
    3: {"FULL_SHARD": SOME},
    4: {"HYBRID_SHARD": SOME},
}


def wrapped(net: Net, strategy: str, world: int) -> FSDP:
    """A unit per block and one of the rest, without 0-d parameters, which FSDP1 does not take."""
    options: dict[str, Any] = {}
    if strategy == "HYBRID_SHARD":
        names = ("replicate", "shard")
        options["device_mesh"] = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=names)
    return FSDP(
        net,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        sharding_strategy=ShardingStrategy[strategy],
        ignored_states=net.ignored(),
        use_orig_params=True,
        device_id=CPU,
        **options,
    )


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    with FSDP.summon_full_params(model):
        return {
            fqn.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
            for fqn, p in model.named_parameters()
        }


def train(model: nn.Module, optimizer: Any, rank: int, first: int, last: int) -> None:
    for step in range(first, last):
        model.zero_grad()
        model(step, rank).backward()
        optimizer.step(torch.tensor(loss_of(step, rank)))


def run(name: str, strategy: str, rank: int, world: int) -> dict[str, Any]:
    model = wrapped(Net(), strategy, world)
    optimizer = SETTINGS[name].build(trainable(model))
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
        model = wrapped(net, layout, world)
        return model, case.build(trainable(model))

    model, optimizer = built("FULL_SHARD")
    train(model, optimizer, rank, 0, 3)
    pylo_dist.checkpoint.save(folder, {"model": model, "optimizer": optimizer})
    gathered = pylo_dist.full_state_dict(optimizer)
    train(model, optimizer, rank, 3, 6)
    results = {"straight": snapshot(model)}
    for layout in ("FULL_SHARD", "SHARD_GRAD_OP", "zero2"):
        model, optimizer = built(layout)
        pylo_dist.checkpoint.load(folder, {"model": model, "optimizer": optimizer})
        again = pylo_dist.full_state_dict(optimizer)
        for i, entries in gathered.get("state", {}).items():  # {} but on the first rank
            assert all(torch.equal(t, again["state"][i][key]) for key, t in entries.items())
        train(model, optimizer, rank, 3, 6)
        results[layout] = snapshot(model)
    pylo_dist.checkpoint.save(f"{folder}_zero2", {"model": model, "optimizer": optimizer})
    model, optimizer = built("FULL_SHARD")
    pylo_dist.checkpoint.load(f"{folder}_zero2", {"model": model, "optimizer": optimizer})
    results["back"] = snapshot(model)
    return results


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.second(torch.tanh(self.first(x))).square().sum()
        return total


def small(**options: Any) -> FSDP:
    return FSDP(Small(), use_orig_params=True, device_id=CPU, **options)


def adafac(params: Any, **kwargs: Any) -> pylo_dist.AdafacLO:
    return pylo_dist.AdafacLO(params, weights=small_fc(), **kwargs)


def batch(rank: int, part: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * rank + part)
    return torch.randn(4, 5, generator=generator)


def habits(rank: int, world: int) -> dict[str, Tensor]:
    """What training loops do, beside one process: parameters after three steps."""
    results = {}

    def three(name: str, model: nn.Module, backward: Callable[[], None], **kwargs: Any) -> None:
        decayed = [(n, p) for n, p in model.named_parameters() if "weight" in n]
        others = [(n, p) for n, p in model.named_parameters() if "weight" not in n]
        groups = [{"params": decayed, "weight_decay": 0.001}, {"params": others}]
        optimizer = adafac(groups, **kwargs)
        for step in range(3):
            if name.startswith("frozen"):
                for n, p in model.named_parameters():
                    p.requires_grad_("first" not in n or step != 1)
            optimizer.zero_grad()
            backward()
            if name.startswith("evaluated"):  # which leaves the root gathered
                with torch.no_grad():
                    model(batch(5))
            if name.startswith("clipped by hand"):
                pylo_dist.clip_grad_norm_(optimizer, 0.5)
            optimizer.step()
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
        ("frozen", 1, {}),
        ("evaluated", 1, {}),
        ("accumulated", 2, {}),
        ("accumulated without sync", 2, {}),
    ):
        model = small()
        if parts == 1:
            three(name, model, lambda model=model: model(batch(rank)).backward(), **kwargs)
        else:
            sync = "without" not in name
            three(name, model, lambda m=model, s=sync: micro_batches(m, s), **kwargs)
        alone = Small()
        three(
            f"{name}, alone",
            alone,
            lambda m=alone, n=parts: mean_of_all(m, n),
            process_group=False,
            **kwargs,
        )
    half = small(mixed_precision=MixedPrecision(param_dtype=torch.bfloat16))
    three("bfloat16", half, lambda: half(batch(rank)).backward())
    return results


def refused(rank: int, world: int) -> dict[str, tuple[str, float]]:
    """What is refused, with how long it took: nobody waits for the timeout of the group."""

    def built_before() -> None:
        model = Small()
        optimizer = adafac(model.named_parameters())
        sharded = FSDP(model, use_orig_params=True, device_id=CPU)
        sharded(batch(rank)).backward()
        optimizer.step()

    def flat() -> None:
        adafac(FSDP(Small(), use_orig_params=False, device_id=CPU).named_parameters())

    def zero() -> None:
        pylo_dist.ZeroOptimizer(small().named_parameters(), pylo_dist.AdafacLO, weights=small_fc())

    def shard() -> None:
        pylo_dist.shard(small(), pylo_dist.AdafacLO, weights=small_fc())

    def one_fails() -> None:
        model = small()
        pylo_dist.AdafacLO(model.named_parameters(), weights="/nowhere" if rank else small_fc())

    def unlike() -> None:
        model = small()
        adafac(model.named_parameters(), max_grad_norm=1.0 + rank)

    def gone() -> None:
        params = list(small().named_parameters())
        adafac(params)

    def summoned() -> None:
        model = small()
        with FSDP.summon_full_params(model):
            adafac(model.named_parameters())

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
        built_before, flat, zero, shard, one_fails, unlike, gone, summoned, beside_fsdp2, copied,
        other_torch,
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
    "flat": r"ValueError: '_flat_param'.*use_orig_params=True",
    "zero": r"ValueError: '.*first.weight'.*FullyShardedDataParallel.*sharded already",
    "shard": r"ValueError: the model is wrapped in FullyShardedDataParallel",
    "one_fails": r"/nowhere",
    "unlike": r"ValueError: the ranks disagree.*max_grad_norm",
    "gone": r"ValueError: .*FullyShardedDataParallel module that is gone",
    "summoned": r"ValueError: .*summon_full_params",
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
            copies = strategy in ("NO_SHARD", "HYBRID_SHARD")
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
        for layout in ("FULL_SHARD", "SHARD_GRAD_OP", "zero2", "back"):
            for fqn, tensor in found["straight"].items():
                assert torch.equal(found[layout][fqn], tensor), (layout, fqn)


def test_loops_train_as_one_process_does(results: list[dict[str, Any]]) -> None:
    if "habits" not in results[0]:
        pytest.skip("on two ranks")
    for result in results:
        found = result["habits"]
        assert bool(found["bfloat16"].isfinite().all())
        for name in [name for name in found if f"{name}, alone" in found]:
            # backward on half the batch each: matrix products of other shapes round differently
            torch.testing.assert_close(
                found[name], found[f"{name}, alone"], rtol=1e-4, atol=1e-6, msg=name
            )


def test_what_cannot_be_served_is_refused_on_all_ranks(results: list[dict[str, Any]]) -> None:
    if "refused" not in results[0]:
        pytest.skip("on two ranks")
    for result in results:
        assert result["refused"].keys() == REFUSALS.keys()
        for name, (text, seconds) in result["refused"].items():
            assert re.search(REFUSALS[name], text), (name, text)
            assert seconds < 20, (name, seconds)

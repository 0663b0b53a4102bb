"""pylo_dist.shard, clip_grad_norm_, checkpoints of sharded state, and what FSDP2 brings along, on
real gloo processes.
"""

from __future__ import annotations

import copy
import functools
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import pylo_dist
from pylo_dist import comm
from pylo_dist.adapters.fully_sharded import units_of
from pylo_dist.layouts import plain
from pylo_dist.layouts.gradients import settle
from support.clip_cases import (
    Results,
    calls_per_step,
    check_calls,
    check_clip,
    check_pieces,
    clip_ranks,
    clipped_pieces,
    message,
)
from support.collectives import Collectives
from support.dtensors import build, fully_sharded, local
from support.golden import velo_weights
from support.optimizers import small_fc
from support.ranks import run_ranks
from support.sharded_model import (
    STEPS,
    Net,
    integers,
    loss_of,
    mean_gradients,
    snapshot,
    trainable,
    unsharded,
)


def net() -> Net:
    """FSDP2 cannot have a parameter that only some ranks use, unless it ignores it."""
    model = Net(seed=dist.get_rank() if dist.is_initialized() else 0)
    model.own.always = True
    return model


# -------------------------------------------------------------------------------------------- shard


class Mlp(nn.Module):
    """Blocks in a ModuleDict, a tied head, and a reset_parameters() for everything: can be built on
    the meta device.
    """

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.layers = nn.ModuleDict(
            {
                str(i): nn.Sequential(nn.Linear(width, 9), nn.ReLU(), nn.Linear(9, width))
                for i in range(2)
            }
        )
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers.values():
            x = x + layer(x)
        return nn.functional.cross_entropy(self.head(self.norm(x)), tokens)


def shard_ranks(rank: int, world: int) -> Results:
    results: Results = {}
    # different numbers on every rank, and a whole run
    kwargs: dict[str, Any] = {"weights": velo_weights("small"), "num_steps": 100}
    model, optimizer = pylo_dist.shard(net(), pylo_dist.VeLO, **kwargs)
    results["units"] = [
        name for name, module in model.named_modules() if isinstance(module, FSDPModule)
    ]
    results["start"] = snapshot(model)
    for step in range(STEPS):
        model.zero_grad()
        model(step, rank).backward()
        optimizer.step(torch.tensor(loss_of(step, rank)))
    results["params"] = snapshot(model)
    results["names"] = [row["fqn"] for row in optimizer.report()]
    results["report"] = [
        (row["fqn"], row["group_size"], row["replicas"]) for row in optimizer.report()
    ]

    # on the meta device, and widths recorded before sharding
    with torch.device("meta"):
        meta = Mlp()
    torch.manual_seed(5 + rank)
    before = torch.get_rng_state()
    meta, _ = pylo_dist.shard(meta, pylo_dist.AdafacLO, weights=small_fc())
    results["meta"] = {**snapshot(meta), **{name: b.clone() for name, b in meta.named_buffers()}}
    results["rng kept"] = torch.equal(before, torch.get_rng_state())
    wide = Mlp()
    wide.norm = nn.LayerNorm(6)  # torch's batch norm takes no mixed dtypes on a CPU
    for fqn, p in wide.named_parameters():
        p.infshape = Infshape(2 if p.dim() == 2 else 1, 3.0 if fqn.startswith("layers.1") else 1.0)
    _, mulo = pylo_dist.shard(
        wide, pylo_dist.MuLO, weights=small_fc(), mixed_precision=torch.bfloat16
    )
    results["width_mults"] = mulo.param_groups[0]["width_mults"]
    wide(torch.arange(8) % 11).backward()
    mulo.step()
    results["mixed"] = sorted(
        {str(p.dtype) for p in wide.parameters()} | {str(p.grad.dtype) for p in wide.parameters()}
    )

    # settings around the model that must not change a bit: checkpointing, compilation, accumulation
    # in two parts, an evaluation between backward and step, which leaves the root gathered
    tokens = torch.arange(12) * (rank + 3) % 11
    trained = {}
    for variant in ("as is", "checkpointed", "compiled", "halves", "evaluated"):
        torch.manual_seed(0)
        mlp = Mlp()
        if variant == "checkpointed":
            for name, layer in list(mlp.layers.items()):
                mlp.layers[name] = checkpoint_wrapper(layer)
        mlp, adafac = pylo_dist.shard(mlp, pylo_dist.AdafacLO, weights=small_fc())
        called = torch.compile(mlp, backend="aot_eager") if variant == "compiled" else mlp
        for _ in range(3):
            mlp.zero_grad()
            if variant == "halves":
                mlp.set_requires_gradient_sync(False)
                (0.5 * called(tokens)).backward()
                mlp.set_requires_gradient_sync(True)
                (0.5 * called(tokens)).backward()
            else:
                called(tokens).backward()
            if variant == "evaluated":
                with torch.no_grad():
                    mlp.eval()(tokens)
                mlp.train()
            adafac.step()
        trained[variant] = {
            fqn.replace("_checkpoint_wrapped_module.", ""): p for fqn, p in snapshot(mlp).items()
        }
    results["trained"] = trained
    results["refused"] = shard_refusals(rank, world)
    results["odd"] = odd_ranks(rank, world)
    return results


class Infshape:
    """What mup.set_base_shapes leaves on a parameter."""

    def __init__(self, ninf: int, mult: float) -> None:
        self._ninf, self._mult = ninf, mult

    def ninf(self) -> int:
        return self._ninf

    def width_mult(self) -> float:
        return self._mult


def shard_refusals(rank: int, world: int) -> dict[str, str]:
    def shard(model: nn.Module, **kwargs: Any) -> Any:
        return pylo_dist.shard(model, pylo_dist.AdafacLO, weights=small_fc(), **kwargs)

    def adafac(params: Any) -> Any:
        return pylo_dist.AdafacLO(params, weights=small_fc())

    def stale() -> None:
        mlp = Mlp(8)
        optimizer = adafac(mlp.named_parameters())
        fully_shard(mlp)
        mlp(torch.arange(8)).backward()
        optimizer.step()

    def fsdp1(use_orig_params: bool) -> None:
        cpu = torch.device("cpu")
        adafac(
            FullyShardedDataParallel(
                Mlp(), use_orig_params=use_orig_params, device_id=cpu
            ).named_parameters()
        )

    def distributed(
        placements: list[Any],
        shape: tuple[int, ...],
        names: tuple[str, ...],
        sizes: tuple[int, ...],
    ) -> Any:
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        return [
            (
                "experts.weight",
                nn.Parameter(distribute_tensor(torch.zeros(shape), mesh, placements)),
            )
        ]

    def strided() -> None:
        from torch.distributed.tensor.placement_types import _StridedShard

        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
        param = DTensor.from_local(
            torch.zeros(4, 3), mesh, [_StridedShard(0, split_factor=4)], run_check=False
        )
        adafac([("twice", nn.Parameter(param))])

    def disagree(kind: str) -> None:
        model = Mlp(6 if kind != "shape" or rank == 0 else 7)
        fully_shard(model)
        named = list(model.named_parameters())
        if kind == "order" and rank:
            named = named[::-1]
        if kind == "frozen" and rank:
            named[2][1].requires_grad_(False)
        adafac(named)

    def differ(kind: str) -> None:
        mlp, settings = Mlp(), {}
        if rank and kind == "layer":
            mlp.extra = nn.Linear(3, 3)
        elif rank and kind == "dtype":
            mlp.bfloat16()
        elif rank:
            settings = {"wrap": {"wrap": [nn.Linear]}, "policy": {"mixed_precision": torch.half}}[
                kind
            ]
        shard(mlp, **settings)

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Parameter(torch.zeros(3, device="meta"))

    sharded = Mlp()
    fully_shard(sharded)
    cases = {
        "twice": lambda: shard(sharded),
        "ddp": lambda: shard(nn.parallel.DistributedDataParallel(Mlp())),
        "bare": lambda: shard(Bare()),
        "wrap": lambda: shard(Mlp(), wrap=[nn.Conv1d]),
        "mesh": lambda: shard(
            Mlp(), mesh=init_device_mesh("cpu", (world, 1), mesh_dim_names=("dp", "tp"))
        ),
        "meta": lambda: adafac([("w", nn.Parameter(torch.zeros(3, device="meta")))]),
        "stale": stale,
        "fsdp1 pieces": lambda: fsdp1(True),
        "fsdp1 flat": lambda: fsdp1(False),
        "strided": strided,
        "zero": lambda: pylo_dist.ZeroOptimizer(sharded, pylo_dist.AdafacLO, weights=small_fc()),
        "experts": lambda: adafac(distributed([Shard(0)], (4, 3), ("ep",), (world,))),
        "inner dims": lambda: adafac(
            distributed([Shard(1), Shard(2)], (2, 4, 4), ("a", "b"), (1, world))
        ),
        "order": lambda: disagree("order"),
        "frozen": lambda: disagree("frozen"),
        "shape": lambda: disagree("shape"),
        **{f"other {kind}": functools.partial(differ, kind) for kind in DIFFERENCES},
    }
    return {name: message(action) for name, action in cases.items()}


def partial_gradients(rank: int, world: int) -> dict[str, bool]:
    """`settle` against what DTensor makes of the same gradients one by one."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("a", "b"))
    mine = integers("partial", rank, 0, shape=(8, 6))
    cases: dict[str, tuple[list[Any], list[Any]]] = {
        "both axes": ([Partial(), Partial("avg")], [Replicate(), Replicate()]),
        "one axis": ([Replicate(), Partial()], [Replicate(), Replicate()]),
        "into shards": ([Shard(0), Partial()], [Shard(0), Shard(1)]),
        "nothing to add": ([Shard(0), Replicate()], [Shard(0), Replicate()]),
        # nobody's gradient; DTensor serves it
        "largest": ([Partial("max"), Replicate()], [Replicate(), Replicate()]),
    }
    bound = []
    for name, (given, wanted) in cases.items():
        param = nn.Parameter(
            distribute_tensor(torch.zeros(16 if given[0] == Shard(0) else 8, 6), mesh, wanted)
        )
        # what is replicated has to be the same on all ranks of that axis
        local = (
            integers("same", mesh.get_local_rank(0), 0, shape=(8, 6))
            if given[1] == Replicate()
            else mine
        )
        local = (
            integers("same", mesh.get_local_rank(1), 0, shape=(8, 6))
            if name == "one axis"
            else local
        )
        param.grad = DTensor.from_local(local, mesh, given, run_check=False)
        bound.append((plain.describe(name, param), param))
    found = {}
    with Collectives() as calls:
        settled = comm.serve(settle(bound))
    for (binding, param), (_, wanted) in zip(bound, cases.values(), strict=True):
        got = settled.sums.get(id(param), param.grad)
        got = got.redistribute(mesh, wanted).to_local()
        found[binding.shard.fqn] = torch.equal(
            got, param.grad.redistribute(mesh, wanted).to_local()
        )
    # axis a; axis b twice, as one gradient needs both in turn
    found["calls"] = dict(calls.counts) == {"allreduce_": 3}
    return found


def on_one_rank_alone(rank: int, world: int) -> dict[str, tuple[str, float]]:
    """What the last rank does wrong alone: the error of each rank, and the seconds until it
    came.
    """
    mesh, last = init_device_mesh("cpu", (world,)), rank == world - 1
    left, right = (DeviceMesh("cpu", [other, world - 1]) for other in (0, 1))

    def cut(dtype: torch.dtype = torch.float32, on: Any = mesh) -> nn.Parameter:
        return nn.Parameter(
            DTensor.from_local(torch.zeros(4, 3, dtype=dtype), on, [Shard(0)], run_check=False)
        )

    def adafac(params: Any, **kwargs: Any) -> Any:
        return pylo_dist.AdafacLO(params, **{"weights": small_fc(), **kwargs})

    def complex_later() -> None:
        optimizer = adafac([("first", cut())])
        optimizer.add_param_group(
            {"params": iter([("w", cut(torch.complex64 if last else torch.float32))])}
        )

    def sharded_complex() -> None:
        mlp = Mlp()
        if last:
            mlp.extra = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        pylo_dist.shard(mlp, pylo_dist.AdafacLO, weights=small_fc())

    def sharded_with(build: Any = pylo_dist.AdafacLO, meta: bool = False, **kwargs: Any) -> None:
        with torch.device("meta" if meta else "cpu"):
            mlp = Mlp()
        if meta and last:
            mlp.norm.reset_parameters = raises
        pylo_dist.shard(mlp, build, weights=small_fc(), **kwargs)

    def raises(*_: Any, **__: Any) -> Any:
        raise ValueError("only here")

    def adamw(params: Any, weights: Any) -> torch.optim.Optimizer:
        return raises() if last else torch.optim.AdamW(params)

    def two_groups(problem: dict[str, Any]) -> None:
        groups = [
            {"params": [("a", cut())]},
            {"params": [("b", cut())], **(problem if last else {})},
        ]
        adafac(iter(groups))

    def whole() -> None:
        optimizer = adafac([("w", nn.Parameter(torch.zeros(4 * world, 3)) if last else cut())])
        for _ in range(200):  # a whole parameter does not wait in its constructor
            optimizer.step()
            time.sleep(0.1)

    cases = {
        "complex": lambda: adafac([("w", cut(torch.complex64 if last else torch.float32))]),
        "complex later": complex_later,
        "complex in shard": sharded_complex,
        "argument of shard": lambda: sharded_with(mesh=5 if last else None),
        "wrap": lambda: sharded_with(wrap=raises if last else None),
        "callable": lambda: sharded_with(lambda p, **k: raises() if last else adafac(p, **k)),
        "callable of torch": lambda: sharded_with(adamw),
        "reset_parameters": lambda: sharded_with(meta=True),
        "weights": lambda: adafac(
            [("w", cut())], weights="/nowhere/weights.safetensors" if last else small_fc()
        ),
        "second group": lambda: two_groups({"lr": -1.0}),
        "same twice": lambda: adafac([("w", w := cut()), *([("w again", w)] if last else [])]),
        "torn": lambda: adafac(
            [("w", cut(on=left if last else mesh)), ("v", cut(on=right if last else mesh))]
        ),
        "whole": whole,
        "fine": lambda: adafac([("w", cut())]),  # and the ranks are in step still
    }
    results = {}
    for name, action in cases.items():
        start = time.monotonic()
        results[name] = message(action), time.monotonic() - start
    return results


def odd_ranks(rank: int, world: int) -> Results:
    """bf16 parameters, NaN and failures on one rank, offloading, parameters that were swapped,
    torch's optimizer state dicts.
    """
    results: Results = {}
    probe = copy.deepcopy(Net().blocks[0].odd).bfloat16()
    fully_shard(probe)
    optimizer = pylo_dist.AdafacLO(trainable(probe), weights=small_fc())
    for step in range(3):
        probe.zero_grad()
        probe(step, rank).backward()
        optimizer.step()
    results["bf16"] = snapshot(probe)
    results["bf16 state"] = sorted(
        {str(t.dtype) for state in optimizer.state.values() for t in state.values()}
    )

    for mode in ("error", "skip"):
        model = Net()
        fully_sharded(model, init_device_mesh("cpu", (world,)))
        optimizer = pylo_dist.AdafacLO(trainable(model), weights=small_fc(), nonfinite=mode)
        model(0, rank).backward()
        last = model.blocks[0].up.weight.grad
        if rank == world - 1:
            local(last).view(-1)[1] = float("nan")
        before = (
            snapshot(model),
            [local(t).clone() for state in optimizer.state.values() for t in state.values()],
        )
        results[mode] = message(optimizer.step)
        after = (
            snapshot(model),
            [local(t).clone() for state in optimizer.state.values() for t in state.values()],
        )
        same = all(torch.equal(before[0][fqn], p) for fqn, p in after[0].items())
        results[f"{mode} unchanged"] = same and all(map(torch.equal, before[1], after[1]))
        if rank == world - 1:
            optimizer.fail_next_step(ValueError("only here"))
        results[f"{mode} failure"] = message(optimizer.step)
        if rank == world - 1:
            optimizer.register_step_pre_hook(lambda *_: float("only here"))
        results[f"{mode} hook"] = message(optimizer.step)
        optimizer._optimizer_step_pre_hooks.clear()

        def closure(fails: bool, model: Any = model) -> Tensor:
            model.zero_grad()
            loss = model(0, rank)
            loss.backward()
            return torch.tensor(float("late" if fails and rank == world - 1 else 1))

        for fails in (False, True):
            results[f"{mode} closure"] = message(
                functools.partial(optimizer.step, functools.partial(closure, fails))
            )

    model = Net()
    fully_sharded(
        model, init_device_mesh("cpu", (world,)), offload_policy=CPUOffloadPolicy(pin_memory=False)
    )
    optimizer = pylo_dist.AdafacLO(trainable(model), weights=small_fc())
    model(0, rank).backward()
    optimizer.step()
    results["offloaded"] = snapshot(model)

    # accelerate builds the optimizer first, shards, and puts the new parameters into its groups
    model = Net()
    optimizer = pylo_dist.AdafacLO([p for _, p in trainable(model)], weights=small_fc())
    fully_sharded(model, init_device_mesh("cpu", (world,)))
    optimizer.param_groups[0]["params"] = [p for _, p in trainable(model)]
    model(0, rank).backward()
    optimizer.step()
    results["swapped"] = snapshot(model)
    results["swapped state"] = len(optimizer.state)
    group = optimizer.param_groups[0]
    group["params"] = [nn.Parameter(p.detach()) for p in group["params"]]
    results["swapped late"] = message(optimizer.step)

    # torch.distributed.checkpoint.state_dict, on a fresh optimizer and back
    model = Net()
    fully_sharded(model, init_device_mesh("cpu", (world,)))
    optimizer = pylo_dist.AdafacLO(trainable(model), weights=small_fc())
    model(0, rank).backward()
    optimizer.step()
    saved = get_optimizer_state_dict(model, optimizer)
    results["keys"] = sorted(saved["state"])
    again = pylo_dist.AdafacLO(trainable(model), weights=small_fc())
    set_optimizer_state_dict(model, again, saved)
    pairs = [
        (optimizer.state[p][name], t) for p in again.state for name, t in again.state[p].items()
    ]
    results["set"] = all(torch.equal(local(a), local(b)) and type(a) is type(b) for a, b in pairs)
    results["full"] = pylo_dist.full_state_dict(optimizer)

    results["calls"] = {
        layout: calls_per_step(layout, world) for layout in ("ddp", "fsdp2", "hsdp", "tp")
    }
    results["clip"] = clip_ranks(rank, world, ["fsdp2", "tp", "ddp"])
    results["pieces"] = clipped_pieces(rank)
    return results


# -------------------------------------------------------------------------------------------- tests


def test_shard_and_what_comes_with_it() -> None:
    ranks = run_ranks(2, shard_ranks)
    first = ranks[0]
    reference = Net(seed=0)
    reference.own.always = True
    for fqn, p in reference.named_parameters():
        assert torch.equal(first["start"][fqn], p), fqn
    assert first["units"] == ["", "blocks.0"]
    assert first["names"] == [fqn for fqn, _ in trainable(reference)]
    assert ("own.scalar", 1, 2) in first["report"]
    assert ("blocks.0.up.weight", 2, 1) in first["report"]
    gradients = mean_gradients(2, always=True)
    kwargs: dict[str, Any] = {"weights": velo_weights("small"), "num_steps": 100}
    history, _, _ = unsharded(2, gradients, pylo_dist.VeLO, **kwargs)
    for result in ranks:
        for fqn, p in history[-1].items():
            # tests/contracts/test_real_ranks.py has the exact limits
            torch.testing.assert_close(result["params"][fqn], p, rtol=5e-7, atol=1e-7)
    whole_model = Mlp()
    wanted = {**dict(whole_model.named_parameters()), **dict(whole_model.named_buffers())}
    torch.manual_seed(5)
    for module in whole_model.modules():  # the head draws the tied weight again
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for result in ranks:
        assert result["rng kept"]
        for name, tensor in wanted.items():
            assert torch.equal(result["meta"][name], tensor), name
    assert {k for k, v in first["width_mults"].items() if v == 3.0} == {
        "layers.1.0.weight",
        "layers.1.2.weight",
    }
    assert first["mixed"] == ["torch.float32"]
    for variant in ("checkpointed", "compiled", "halves", "evaluated"):
        for fqn, p in first["trained"]["as is"].items():
            assert torch.equal(p, first["trained"][variant][fqn]), (variant, fqn)
    check_refusals([result["refused"] for result in ranks])
    check_odd([result["odd"] for result in ranks])


# what rank 0 has, and rank 1
DIFFERENCES = {
    "layer": "rank 0 has .*, rank 1 has .*extra.weight",
    "dtype": "rank 0 has .*torch.float32.*, rank 1 has .*torch.bfloat16",
    "wrap": "rank 0 has .*, rank 1 has the unit ",
    "policy": "rank 0 has mixed_precision=None, rank 1 has mixed_precision=torch.float16",
}
REFUSALS = {
    **{
        f"other {kind}": rf"the ranks disagree on setting, unit or tensor .* number \d+: {text}"
        for kind, text in DIFFERENCES.items()
    },
    "twice": "was given to fully_shard before",
    "ddp": "wrapped in DistributedDataParallel",
    "bare": "'own' is on the meta device, and Bare has no reset_parameters",
    "wrap": "wrap names Conv1d",
    "mesh": "the mesh has the dimension 'tp'",
    "meta": "'w' is on the meta device",
    "stale": "'embedding.weight'.*given to fully_shard after this optimizer was built",
    "fsdp1 pieces": r"FullyShardedDataParallel module that is gone",
    "fsdp1 flat": r"FullyShardedDataParallel module that is gone",
    "strided": "'twice' with placements .*cut in strides on dimension 0",
    "zero": "'embedding.weight' is a DTensor.*ZeroOptimizer shards whole parameters",
    "experts": "'experts.weight' lies on the mesh dimension 'ep'",
    "inner dims": "no error",  # an axis of one rank cuts nothing
    "order": r"ranks disagree on setting or parameter number \d+: .*embedding.weight",
    "frozen": r"ranks disagree on setting or parameter number \d+: .*layers.0.0.bias",
    "shape": r"ranks disagree on setting or parameter number \d+: .*embedding.weight",
}


def check_refusals(results: list[dict[str, str]]) -> None:
    for result in results:
        for name, text in result.items():
            assert re.search(REFUSALS[name], text), (name, text)


def check_odd(results: list[Results]) -> None:
    first, last = results[0], results[-1]
    probe = copy.deepcopy(Net().blocks[0].odd).bfloat16()
    optimizer = pylo_dist.AdafacLO(trainable(probe), weights=small_fc())
    for step in range(3):
        for name, p in trainable(probe):
            if name != "unused":
                p.grad = (
                    (
                        integers(name, step, 0, shape=p.shape)
                        + integers(name, step, 1, shape=p.shape)
                    )
                    / 2
                ).bfloat16()
        optimizer.step()
    for fqn, p in probe.named_parameters():
        assert torch.equal(first["bf16"][fqn], p), fqn
    assert first["bf16 state"] == ["torch.float32"]
    for result in results:
        assert re.search(
            r"NonFiniteGradientError: the gradient of 'blocks.0.up.weight' holds", result["error"]
        )
        assert result["skip"] == "no error"
        assert result["error unchanged"]
        assert result["skip unchanged"]
    for mode in ("error", "skip"):
        assert first[f"{mode} failure"].startswith("PeerError")
        assert last[f"{mode} failure"] == "ValueError: only here"
        assert first[f"{mode} hook"].startswith("PeerError")
        assert first[f"{mode} closure"].startswith("PeerError")
        assert last[f"{mode} closure"].startswith("ValueError: could not convert string")
        assert last[f"{mode} hook"].startswith("ValueError: could not convert")
    history, reference, model = unsharded(
        2, mean_gradients(2)[:1], pylo_dist.AdafacLO, weights=small_fc()
    )
    for fqn, p in history[-1].items():
        torch.testing.assert_close(first["offloaded"][fqn], p, rtol=5e-7, atol=1e-7)
        assert torch.equal(first["offloaded"][fqn], first["swapped"][fqn]), fqn
    assert first["swapped state"] == len(trainable(model))
    assert re.search(
        "'group0.0' was replaced by another tensor after 1 steps", first["swapped late"]
    )
    assert first["keys"] == sorted(fqn for fqn, _ in trainable(model))
    assert all(result["set"] for result in results)
    reference.load_state_dict(first["full"])  # canonical names, shapes and dtypes
    assert last["full"] == {}
    check_calls(first["calls"])
    check_clip([result["clip"] for result in results])
    assert all(
        result["clip"][f"{layout}/step"] is False
        for result in results
        for layout in ("fsdp2", "tp", "ddp")
    )
    check_pieces([result["pieces"] for result in results])


ALONE = {  # what the last rank says, and what all others say after "rank 3: "
    "complex": "'w' is torch.complex64",
    "complex later": "'w' is torch.complex64",
    "complex in shard": "'extra' is torch.complex64",
    "argument of shard": "mesh=5: wanted a DeviceMesh",
    **dict.fromkeys(("wrap", "callable", "callable of torch", "reset_parameters"), "only here"),
    "weights": "/nowhere/weights.safetensors",
    "second group": "lr=-1.0: wanted a finite number >= 0",
    "same twice": "'w again' is in the same group twice",
    "torn": r"'v' lies on the ranks \[1, 3\], 'w' on \[0, 3\]: neither holds the other",
    "whole": "'w' and all other parameters are whole tensors here, on rank [012] of the same "
    "AdafacLO they are sharded",
}


def check_alone(results: list[dict[str, tuple[str, float]]]) -> None:
    """All ranks raise, and none has waited for the minute that the process group gives it."""
    for rank, result in enumerate(results):
        assert result.pop("fine")[0] == "no error"
        assert result.keys() == ALONE.keys()
        for name, (text, seconds) in result.items():
            last = rank == len(results) - 1
            assert re.search(
                ALONE[name] if last else f"rank 3: .*{ALONE[name]}|has .*{ALONE[name]}", text
            ), (name, rank, text)
            assert seconds < 20, (name, rank, seconds)
            if ALONE[name] == "only here":  # by a function of the user
                assert text.startswith("ValueError" if last else "PeerError"), (name, rank, text)


def test_units() -> None:
    model = Net(blocks=2)
    assert units_of(model) == [model.blocks[1], model.blocks[0]]
    # innermost first; what shares a parameter stays with the unit that holds both
    assert units_of(model, [nn.Embedding, nn.Linear]) == [
        b.__getattr__(n) for b in reversed(model.blocks) for n in ("down", "up")
    ]
    assert units_of(model, lambda module: module is model.own) == [model.own]
    model._no_split_modules = ["Block"]
    assert units_of(model) == [model.blocks[1], model.blocks[0]]
    with pytest.raises(ValueError, match="not initialised"):
        pylo_dist.shard(model, pylo_dist.AdafacLO, weights=small_fc())


# -------------------------------------------------------------------------------------- checkpoints


def unequal_copies(rank: int, world: int) -> str:
    """Ranks that were seeded otherwise: each of the two halves would hold a model of its own."""
    torch.manual_seed(rank // 2)
    model = nn.Linear(5, 4)
    fully_shard(
        model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    )
    return message(lambda: pylo_dist.AdafacLO(model.named_parameters(), weights=small_fc()))


def train_and_save(rank: int, world: int, folder: str) -> Results:
    results: Results = {
        "clip": clip_ranks(rank, world, ["hsdp", "tp_fsdp2"]),
        "unequal": unequal_copies(rank, world),
    }
    results["calls"] = {layout: calls_per_step(layout, world) for layout in ("hsdp", "tp_fsdp2")}
    results["partial"] = partial_gradients(rank, world)
    results["alone"] = on_one_rank_alone(rank, world)
    for layout in ("fsdp2", "hsdp", "tp_fsdp2"):
        model, called, place, _ = build(layout, world)
        optimizer = pylo_dist.AdafacLO(trainable(model), weights=small_fc())
        for step in range(2):
            model.zero_grad()
            called(step, place).backward()
            optimizer.step()
        pylo_dist.checkpoint.save(f"{folder}/{layout}", {"optimizer": optimizer, "model": model})
        results[layout] = pylo_dist.full_state_dict(optimizer, rank0_only=False), snapshot(model)
    for layout in ("fsdp2", "hsdp", "tp_fsdp2"):  # and from each into the next
        model, *_ = build(layout, world)
        optimizer = pylo_dist.AdafacLO(trainable(model), weights=small_fc())
        source = {"fsdp2": "tp_fsdp2", "hsdp": "fsdp2", "tp_fsdp2": "hsdp"}[layout]
        pylo_dist.checkpoint.load(f"{folder}/{source}", {"optimizer": optimizer, "model": model})
        results[f"{source} into {layout}"] = (
            pylo_dist.full_state_dict(optimizer, rank0_only=False),
            snapshot(model),
        )
    return results


def load_and_go_on(rank: int, world: int, folder: str) -> Results:
    """Under ZeRO and FSDP2 on another number of ranks: the state that came, and one step more."""
    results = {}
    for layout in ("zero", "fsdp2"):
        model = Net(seed=3)
        if layout == "fsdp2":
            fully_sharded(model, init_device_mesh("cpu", (world,)))
            optimizer: Any = pylo_dist.AdafacLO(trainable(model), weights=small_fc())
        else:
            optimizer = pylo_dist.ZeroOptimizer(
                model, pylo_dist.AdafacLO, weights=small_fc(), bucket_cap_mb=0.002
            )
        pylo_dist.checkpoint.load(f"{folder}/fsdp2", {"optimizer": optimizer, "model": model})
        state = pylo_dist.full_state_dict(optimizer, rank0_only=False), snapshot(model)
        model(2, rank).backward()
        optimizer.step()
        results[layout] = (*state, snapshot(model))
    return results


def assert_same(got: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    for key, tensor in wanted[1].items():
        assert torch.equal(got[1][key], tensor), key
    assert got[0]["state"].keys() == wanted[0]["state"].keys()
    for key, state in wanted[0]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(got[0]["state"][key][name], tensor), (key, name)
    assert got[0]["param_groups"][0]["step"] == wanted[0]["param_groups"][0]["step"]


def test_checkpoints_between_layouts(tmp_path: Path) -> None:
    saved = run_ranks(4, train_and_save, str(tmp_path))
    check_clip([result["clip"] for result in saved])
    check_calls(saved[0]["calls"])
    assert all(all(result["partial"].values()) for result in saved), saved[0]["partial"]
    check_alone([result["alone"] for result in saved])
    for result in saved:
        assert (
            "'weight' differs between the ranks 0 and 2, which hold copies of it"
            in result["unequal"]
        )
    for result in saved:
        for source, target in (("tp_fsdp2", "fsdp2"), ("fsdp2", "hsdp"), ("hsdp", "tp_fsdp2")):
            assert_same(result[f"{source} into {target}"], saved[0][source])
    loaded = run_ranks(2, load_and_go_on, str(tmp_path))
    model = Net(seed=3)
    optimizer = pylo_dist.AdafacLO(trainable(model), weights=small_fc())
    pylo_dist.checkpoint.load(tmp_path / "fsdp2", {"optimizer": optimizer, "model": model})
    assert_same((pylo_dist.full_state_dict(optimizer), snapshot(model)), saved[0]["fsdp2"])
    for fqn, gradient in mean_gradients(2)[2].items():
        model.get_parameter(fqn).grad = gradient
    optimizer.step()
    for result in loaded:
        for layout in ("zero", "fsdp2"):
            assert_same(result[layout], saved[0]["fsdp2"])
            for fqn, p in snapshot(model).items():
                torch.testing.assert_close(result[layout][2][fqn], p, rtol=5e-7, atol=1e-7)

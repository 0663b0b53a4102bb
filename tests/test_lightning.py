"""Lightning's Trainer drives learned optimizers under its own strategies, and a ZeroOptimizer under
ours: the parameters of one process, also with micro-batches and from a checkpoint.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pylo_dist
from support.golden import velo_weights
from support.optimizers import small_fc
from support.ranks import run_ranks

lightning = pytest.importorskip("lightning", reason="Lightning is not installed: lightning>=2.6")

SAMPLES, BATCH, WORLD = 24, 4, 2
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdafacLO": (pylo_dist.AdafacLO, {"weights": small_fc()}),
    "VeLO": (pylo_dist.VeLO, {"weights": velo_weights("small"), "num_steps": 6}),
}
# per case: which optimizer, further arguments of it, micro-batches of a step, epochs
CASES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "ddp": ("AdafacLO", {}, 1, 1),
    "ddp, VeLO": ("VeLO", {}, 1, 1),
    "ddp, accumulated": ("AdafacLO", {"max_grad_norm": 0.1}, 3, 1),
    "ddp, clipped by the Trainer": ("AdafacLO", {"max_grad_norm": 0.1}, 1, 1),
    "ddp, resumed": ("AdafacLO", {}, 1, 2),
    "fully_shard": ("AdafacLO", {}, 1, 1),
    "fully_shard, resumed": ("AdafacLO", {}, 1, 2),
    "ZeroOptimizer of the DDP module": ("AdafacLO", {}, 1, 1),
    "zero 1": ("VeLO", {}, 1, 1),
    "zero 2": ("AdafacLO", {}, 1, 1),
    "zero 2, accumulated": ("AdafacLO", {"max_grad_norm": 0.1}, 3, 1),
    "zero 2, resumed": ("AdafacLO", {}, 1, 2),
}


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    inputs, targets = (torch.randn(SAMPLES, n, generator=generator) for n in (7, 3))
    return TensorDataset(inputs, targets)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def values(model: nn.Module) -> Tensor:
    whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in whole])


def of_one_process(case: str) -> Tensor:
    name, extra, micros, epochs = CASES[case]
    face, arguments = KINDS[name]
    model, data = network(), samples()
    optimizer = face(model.parameters(), **arguments, **extra)
    for step in [*range(SAMPLES // (BATCH * WORLD * micros))] * epochs:
        optimizer.zero_grad()
        losses = []
        for micro in range(micros):
            for rank in range(WORLD):
                first = (step * micros + micro) * BATCH
                x, y = data[torch.arange(first, first + BATCH) * WORLD + rank]
                losses.append((model(x) - y).square().mean())
        loss = torch.stack(losses).mean()
        loss.backward()
        optimizer.step(loss)
    return values(model)


def driven(rank: int, world: int, folder: str) -> dict[str, Any]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ["TORCHELASTIC_RUN_ID"] = "test"  # Lightning starts no ranks of its own
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    from lightning.pytorch.strategies import ModelParallelStrategy

    from pylo_dist.lightning import ZeroStrategy

    class Module(lightning.LightningModule):
        def __init__(self, build: Callable[[Any], Any], sharded: bool) -> None:
            super().__init__()
            self.net, self.build, self.sharded = network(), build, sharded

        def configure_model(self) -> None:
            if self.sharded:
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Any, _: int) -> Tensor:
            return (self.net(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            return self.build(self)

    def fit(
        build: Callable[[Any], Any], strategy: Any, resume: str | None = None, **arguments: Any
    ) -> tuple[Any, Any]:
        data = samples()
        sampler: Any = DistributedSampler(data, world, rank, shuffle=False)
        module = Module(build, isinstance(strategy, ModelParallelStrategy))
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=world,
            strategy=strategy,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            **{"max_epochs": 1, **arguments},
        )
        trainer.fit(module, DataLoader(data, BATCH, sampler=sampler), ckpt_path=resume)
        return trainer, module

    found: dict[str, Any] = {}
    for case, (name, extra, micros, epochs) in CASES.items():
        face, arguments = KINDS[name]
        kwargs = {**arguments, **extra}
        settings: dict[str, Any] = {"accumulate_grad_batches": micros}
        if "by the Trainer" in case:
            kwargs, settings["gradient_clip_val"] = arguments, extra["max_grad_norm"]

        def build(module: Any, case: str = case, face: Any = face, kwargs: Any = kwargs) -> Any:
            if case.startswith("ZeroOptimizer"):
                return pylo_dist.ZeroOptimizer(module.trainer.strategy.model, face, **kwargs)
            if case.startswith("zero"):
                return pylo_dist.ZeroOptimizer(module, face, stage=int(case[5]), **kwargs)
            return face(module.parameters(), **kwargs)

        def strategy(case: str = case) -> Any:
            if case.startswith("fully_shard"):
                return ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
            return ZeroStrategy() if case.startswith("zero") else "ddp"

        trainer, module = fit(build, strategy(), **settings)
        if epochs == 2:
            path = f"{folder}/{case}.ckpt"
            trainer.save_checkpoint(path)
            if case.startswith("zero"):  # which says the same as one without ZeroOptimizer
                state = torch.load(path, weights_only=True)["optimizer_states"][0]["state"]
                found["whole state"] = all(
                    state[i]["momentum"].shape[-p.dim() :] == p.shape
                    or state[i]["momentum"].shape[: p.dim()] == p.shape
                    for i, p in enumerate(module.net.parameters())
                )
            _, module = fit(build, strategy(), path, max_epochs=2, **settings)
        found[case] = values(module.net)

    def said(build: Callable[[Any], Any], strategy: Any, **settings: Any) -> str:
        try:
            fit(build, strategy, **settings)
        except Exception as error:
            return str(error)
        return "nothing"

    face, kwargs = KINDS["AdafacLO"]

    def zero(module: Any, **more: Any) -> Any:
        return pylo_dist.ZeroOptimizer(module, face, **kwargs, **more)

    found["said"] = {
        "another optimizer": said(lambda m: face(m.parameters(), **kwargs), ZeroStrategy()),
        "clipped": said(zero, ZeroStrategy(), gradient_clip_val=0.1),
        "in ddp": said(zero, "ddp"),
        "stage 2 in ddp": said(lambda m: zero(m, stage=2), "ddp"),
    }
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(WORLD, driven, str(tmp_path_factory.mktemp("lightning")))


@pytest.mark.parametrize("case", CASES)
def test_lightning_steps_as_one_process(results: list[dict[str, Any]], case: str) -> None:
    wanted = of_one_process(case)
    moved = (wanted - values(network())).abs().max()
    for result in results:
        # gradients are sums of micro-batches and ranks in another order, and norms of them
        assert (result[case] - wanted).abs().max() <= 1e-4 * moved
        assert torch.equal(result[case], results[0][case])


def test_what_zero_strategy_saves_and_says(results: list[dict[str, Any]]) -> None:
    assert results[0]["whole state"]
    for result in results:
        said = result["said"]
        assert "a AdafacLO, whose gradients nobody would average" in said["another optimizer"]
        assert "pylo_dist.clip_grad_norm_" in said["clipped"]
        assert "pylo_dist.lightning.ZeroStrategy" in said["in ddp"]
        assert "train the model without it" in said["stage 2 in ddp"]

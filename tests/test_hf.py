"""Hugging Face Trainer and accelerate drive a learned optimizer, and a factory as torchtitan has
it; tiny models made here.

The recipes of the README: `optimizer_cls_and_kwargs`, a callback that brings VeLO its loss, and
accelerate with FSDP1 and with FSDP2, which builds the optimizer before it shards the model.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import pylo_dist
from pylo_dist.maths.lstm import LossBuffer
from support.golden import velo_weights
from support.optimizers import small_fc
from support.ranks import run_ranks
from support.sharded_model import whole

transformers = pytest.importorskip(
    "transformers", reason="the recipes for Hugging Face need transformers"
)
accelerate = pytest.importorskip(
    "accelerate", reason="the recipes for Hugging Face need accelerate"
)

from pylo_dist.huggingface import LossCallback  # noqa: E402

VOCABULARY, LENGTH = 53, 8


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    return transformers.GPT2LMHeadModel(config)


def samples(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


class Losses(LossCallback):
    """The shipped callback, which also notes what every step was given."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.keeper is not None
        assert self.keeper.last is not None
        self.losses.append(float(self.keeper.last))


def test_trainer(tmp_path: Path) -> None:
    callback, steps = Losses(), 6
    trainer = transformers.Trainer(
        model=gpt2(),
        args=transformers.TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            lr_scheduler_type="constant",
            learning_rate=1.0,  # of the scheduler's making only: the optimizer has its own
            max_grad_norm=0.0,  # the optimizer clips at no cost
            report_to="none",
            logging_steps=1,
            save_steps=3,
            disable_tqdm=True,
        ),
        train_dataset=samples(24),
        optimizer_cls_and_kwargs=(
            pylo_dist.VeLO,
            {"weights": velo_weights("small"), "num_steps": steps, "max_grad_norm": 1.0},
        ),
        callbacks=[callback],
    )
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, pylo_dist.VeLO)
    group = optimizer.param_groups[0]
    assert int(group["step"]) == steps
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx(callback.losses, abs=1e-3)  # the Trainer rounds what it logs
    # the loss buffer holds what the steps were given
    means, minima = (
        torch.zeros(10, dtype=torch.float64),
        torch.full((10,), 999999999999.0, dtype=torch.float64),
    )
    for step, loss in enumerate(callback.losses):
        means, minima = LossBuffer(steps, torch.tensor(step)).updated(
            means, minima, torch.tensor(loss, dtype=torch.float64)
        )
    torch.testing.assert_close(group["loss_means"], means, rtol=1e-12, atol=0)
    assert (tmp_path / "checkpoint-3" / "optimizer.pt").exists()
    # and resumes from what it saved
    resumed = gpt2()
    other = transformers.Trainer(
        model=resumed,
        args=trainer.args,
        train_dataset=samples(24),
        optimizer_cls_and_kwargs=trainer.optimizer_cls_and_kwargs,
        callbacks=[LossCallback()],
    )
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for a, b in zip(trainer.model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def accelerated(rank: int, version: int) -> dict[str, Any]:
    """Four steps under FSDP of this version, the optimizer built before FSDP2 and after FSDP1."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator = accelerate.Accelerator(cpu=True)
    # accelerate offers FSDP on accelerators only; what it does to models and optimizers is the
    # same here
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
        reshard_after_forward=True if version == 2 else "FULL_SHARD",
    )
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model = gpt2()
    model = model if version == 2 else accelerator.prepare(model)
    optimizer = pylo_dist.VeLO(model.parameters(), num_steps=4, weights=velo_weights("small"))
    if version == 2:
        model, optimizer = accelerator.prepare(model, optimizer)
    else:
        optimizer = accelerator.prepare(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert version == 1 or all(isinstance(p, DTensor) for p in params)  # they were swapped
    batch = {
        k: torch.stack([row[k] for row in samples(4)[2 * rank : 2 * rank + 2]])
        for k in ("input_ids", "labels")
    }
    for _ in range(4):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.optimizer.set_loss(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert set(optimizer.optimizer.state) == set(params)
    values = model.state_dict()
    return {name: whole(tensor) for name, tensor in values.items() if name != "lm_head.weight"}


def titan(rank: int, world: int) -> dict[str, Any]:
    """A factory over model parts, and the state dict of each, flattened by parameter names, with
    the probe step it may take.
    """

    def build_optimizers(
        parts: list[nn.Module], optimizer_class: Any, **kwargs: Any
    ) -> list[torch.optim.Optimizer]:
        return [
            optimizer_class([p for p in part.parameters() if p.requires_grad], **kwargs)
            for part in parts
        ]

    torch.manual_seed(0)
    part: nn.Module = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False))
    fully_shard(part)
    factory = functools.partial(
        build_optimizers, optimizer_class=pylo_dist.AdafacLO, weights=small_fc()
    )
    (optimizer,) = factory([part])
    part(torch.randn(4, 7)).square().sum().backward()
    optimizer.step()
    before = {name: p.full_tensor() for name, p in part.named_parameters()}
    lr = [group["lr"] for group in optimizer.param_groups]
    # what torch does to an optimizer whose state is made in its first step
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in part.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for group, value in zip(optimizer.param_groups, lr, strict=True):
        group["lr"] = value
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(part, optimizer, options=options)
    (again,) = factory([part])
    set_optimizer_state_dict(part, again, saved, options=options)
    return {
        "probe changed nothing": all(
            torch.equal(before[name], p.full_tensor()) for name, p in part.named_parameters()
        ),
        "steps": [int(o.param_groups[0]["step"]) for o in (optimizer, again)],
        "keys": sorted(key for key in saved if key.startswith("state.0.weight")),
        "same": all(
            torch.equal(
                getattr(a, "_local_tensor", a),
                getattr(again.state[p][name], "_local_tensor", again.state[p][name]),
            )
            for p in part.parameters()
            for name, a in optimizer.state[p].items()
        ),
    }


def both_ranks(rank: int, world: int) -> dict[str, Any]:
    return {
        "titan": titan(rank, world),
        "FSDP2": accelerated(rank, 2),
        "FSDP1": accelerated(rank, 1),
    }


def test_accelerate_on_both_fsdps_and_titan() -> None:
    results = run_ranks(2, both_ranks)
    model = gpt2()
    optimizer = pylo_dist.VeLO(model.parameters(), num_steps=4, weights=velo_weights("small"))
    rows = samples(4)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(4):
        optimizer.zero_grad()
        losses = [
            model(
                **{
                    k: torch.stack([row[k] for row in rows[i : i + 2]])
                    for k in ("input_ids", "labels")
                }
            ).loss
            for i in (0, 2)
        ]
        loss = torch.stack(losses).mean()
        loss.backward()
        optimizer.step(loss)
    for result in results:
        titan = result["titan"]
        assert titan["probe changed nothing"]
        assert titan["same"]
        assert titan["steps"] == [1, 1]
        assert titan["keys"] == [
            f"state.0.weight.{name}" for name in ("col", "momentum", "rms", "row")
        ]
        # gradients of a transformer differ in their last bits
        for name, p in model.named_parameters():
            change = (p - start[name]).abs().max()
            for layout in ("FSDP2", "FSDP1"):
                apart = (result[layout][name] - p).abs().max()
                assert apart <= 2e-3 * change + 1e-7, (layout, name)

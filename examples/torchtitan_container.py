"""torchtitan: the container of its optimizers knows the names of learned ones, under FSDP2. In a
config of torchtitan `optimizer` is then this container's Config.

    torchrun --nproc_per_node=2 examples/torchtitan_container.py

    - OptimizersContainer.Config(param_groups=[ParamGroupConfig(pattern=".*",
    -     optimizer_name="AdamW", optimizer_kwargs={"lr": 3e-4, "weight_decay": 0.1})])
    + LearnedOptimizers.Config(implementation="for-loop", param_groups=[ParamGroupConfig(
    +     pattern=".*", optimizer_name="AdafacLO", optimizer_kwargs={"lr": 1.0})],
    +     optimizer_factory_kwargs_by_name={"AdafacLO": {"weights": "demo"}})
"""

from dataclasses import dataclass

import tiny
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

import pylo_dist


class LearnedOptimizers(OptimizersContainer):
    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name):
        learned = [entry.face for entry in pylo_dist.registered_optimizers().values()]
        faces = {face.__name__: face for face in learned}
        return faces.get(name) or OptimizersContainer._resolve_optimizer_factory(name)


dist.init_process_group()
torch.manual_seed(0)
model = tiny.GPT()
for block in model.blocks:
    fully_shard(block)
fully_shard(model)
config = LearnedOptimizers.Config(
    implementation="for-loop",  # its default, "fused", is refused by name
    param_groups=[
        ParamGroupConfig(pattern=".*", optimizer_name="AdafacLO", optimizer_kwargs={"lr": 1.0})
    ],
    optimizer_factory_kwargs_by_name={"AdafacLO": {"weights": "demo"}},
)
optimizers = config.build(model_parts=[model])
for step, batch in enumerate(tiny.batches(steps=40, rank=dist.get_rank())):
    loss = model(**batch)["loss"]
    loss.backward()
    optimizers.step()
    optimizers.zero_grad()
    if step % 20 == 19 and dist.get_rank() == 0:
        print(f"step {step + 1}: loss {loss.item():.3f}")
dist.destroy_process_group()

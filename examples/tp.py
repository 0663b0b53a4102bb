"""Tensor parallelism: every MLP is cut over the ranks, which read the same data.

torchrun --nproc_per_node=2 examples/tp.py

- optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
+ optimizer = pylo_dist.AdafacLO(model.named_parameters(), weights="demo")
"""

import tiny
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import pylo_dist

dist.init_process_group()
torch.manual_seed(0)
model = tiny.GPT()
# A mesh dimension of this name says that the ranks have one gradient of what is not cut.
mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))
for block in model.blocks:
    parallelize_module(block, mesh, {"linear1": ColwiseParallel(), "linear2": RowwiseParallel()})
optimizer = pylo_dist.AdafacLO(model.named_parameters(), weights="demo")  # after the cut
for step, batch in enumerate(tiny.batches(steps=40)):
    loss = model(**batch)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 19 and dist.get_rank() == 0:
        print(f"step {step + 1}: loss {loss.item():.3f}")
dist.destroy_process_group()

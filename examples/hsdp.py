"""HSDP: copies of the model, each sharded by FSDP2 over a part of the ranks, as on several machines
with a fast network inside each.

    torchrun --nproc_per_node=4 examples/hsdp.py

    - fully_shard(block, mesh=mesh) for every block, fully_shard(model, mesh=mesh)
    - optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    + model, optimizer = pylo_dist.shard(model, pylo_dist.AdafacLO, mesh=mesh, weights="demo")
"""

import tiny
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import pylo_dist

dist.init_process_group()
torch.manual_seed(0)
copies = 2
mesh = init_device_mesh(
    "cpu", (copies, dist.get_world_size() // copies), mesh_dim_names=("copies", "shards")
)
model, optimizer = pylo_dist.shard(tiny.GPT(), pylo_dist.AdafacLO, mesh=mesh, weights="demo")
for step, batch in enumerate(tiny.batches(steps=40, rank=dist.get_rank())):
    loss = model(**batch)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 19 and dist.get_rank() == 0:
        print(f"step {step + 1}: loss {loss.item():.3f}")
dist.destroy_process_group()

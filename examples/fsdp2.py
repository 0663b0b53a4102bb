"""FSDP2, with a learned optimizer that reads the loss and knows the length of the run.

    torchrun --nproc_per_node=2 examples/fsdp2.py [WEIGHTS]

Without WEIGHTS Google's VeLO comes from the Hub.

    - fully_shard(block) for every block, fully_shard(model)
    - optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    + model, optimizer = pylo_dist.shard(model, pylo_dist.VeLO, num_steps=40)
    - optimizer.step()
    + optimizer.step(loss)
"""

import sys

import tiny
import torch
import torch.distributed as dist

import pylo_dist

weights = {"weights": sys.argv[1]} if len(sys.argv) > 1 else {}
dist.init_process_group()
torch.manual_seed(0)
model, optimizer = pylo_dist.shard(tiny.GPT(), pylo_dist.VeLO, num_steps=40, **weights)
for step, batch in enumerate(tiny.batches(steps=40, rank=dist.get_rank())):
    loss = model(**batch)["loss"]
    loss.backward()
    optimizer.step(loss)  # averaged over the ranks inside
    optimizer.zero_grad()
    if step % 20 == 19 and dist.get_rank() == 0:
        print(f"step {step + 1}: loss {loss.item():.3f}")
dist.destroy_process_group()

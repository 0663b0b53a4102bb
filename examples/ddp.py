"""DistributedDataParallel: every rank steps all parameters, as with any optimizer.

torchrun --nproc_per_node=2 examples/ddp.py

- optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
+ optimizer = pylo_dist.AdafacLO(model.named_parameters(), weights="demo")
"""

import tiny
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import pylo_dist

dist.init_process_group()
torch.manual_seed(0)
model = DistributedDataParallel(tiny.GPT())
optimizer = pylo_dist.AdafacLO(model.named_parameters(), weights="demo")
for step, batch in enumerate(tiny.batches(steps=40, rank=dist.get_rank())):
    loss = model(**batch)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 19 and dist.get_rank() == 0:
        print(f"step {step + 1}: loss {loss.item():.3f}")
dist.destroy_process_group()

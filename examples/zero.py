"""ZeRO-2: every rank steps its own part of the parameters, and keeps state and gradients of that
part alone. Saves, and goes on where it was, on any number of ranks.

    torchrun --nproc_per_node=2 examples/zero.py

    - model = DistributedDataParallel(model)
    - optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    + optimizer = pylo_dist.ZeroOptimizer(model, pylo_dist.AdafacLO, stage=2, weights="demo")
"""

import sys

import tiny
import torch
import torch.distributed as dist

import pylo_dist

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/zero"
dist.init_process_group()
torch.manual_seed(0)
model = tiny.GPT()
optimizer = pylo_dist.ZeroOptimizer(model, pylo_dist.AdafacLO, stage=2, weights="demo")
run = {"model": model, "optimizer": optimizer}
published = pylo_dist.checkpoint.published(folder)
if published:
    _, meta = pylo_dist.checkpoint.load(published[-1], run)
    if dist.get_rank() == 0:
        print(f"goes on after step {meta['step']}")
done = meta["step"] if published else 0
for step, batch in enumerate(tiny.batches(steps=40, rank=dist.get_rank()), 1):
    if step <= done:
        continue
    loss = model(**batch)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        pylo_dist.checkpoint.save(f"{folder}/step-{step:08d}", run, meta={"step": step})
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.3f}")
dist.destroy_process_group()

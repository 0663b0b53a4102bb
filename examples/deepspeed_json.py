"""DeepSpeed, the optimizer named in its JSON; stages 0 to 3.

torchrun --nproc_per_node=2 examples/deepspeed_json.py

+ import pylo_dist.deepspeed
- "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "weight_decay": 0.1}}
+ "optimizer": {"type": "AdafacLO", "params": {"weights": "demo"}}
"""

import deepspeed
import tiny
import torch
import torch.distributed as dist

import pylo_dist.deepspeed  # makes the names known to DeepSpeed

CONFIG = {
    "train_micro_batch_size_per_gpu": 16,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdafacLO", "params": {"weights": "demo"}},
}
torch.manual_seed(0)
model = tiny.GPT()
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
for step, batch in enumerate(tiny.batches(steps=40, rank=engine.global_rank)):
    loss = engine(**{name: ids.to(engine.device) for name, ids in batch.items()})["loss"]
    engine.backward(loss)
    engine.step()
    if step % 20 == 19 and engine.global_rank == 0:
        print(f"step {step + 1}: loss {loss.item():.3f}")
dist.destroy_process_group()

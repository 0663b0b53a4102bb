"""accelerate, under DDP, with an optimizer that reads the loss: the loop stays as it is.

torchrun --nproc_per_node=2 examples/accelerate_ddp.py [WEIGHTS]

Without WEIGHTS Google's VeLO comes from the Hub.

- optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
+ optimizer = pylo_dist.VeLO(model.named_parameters(), num_steps=40)
+ pylo_dist.keep_loss(model, optimizer)
"""

import sys

import tiny
import torch
from accelerate import Accelerator

import pylo_dist

weights = {"weights": sys.argv[1]} if len(sys.argv) > 1 else {}
accelerator = Accelerator(cpu=not torch.cuda.is_available())
torch.manual_seed(0)
model = accelerator.prepare(tiny.GPT())
optimizer = pylo_dist.VeLO(model.named_parameters(), num_steps=40, **weights)
pylo_dist.keep_loss(model, optimizer)  # AdafacLO, which reads none, needs no such line
optimizer = accelerator.prepare(optimizer)
for step, batch in enumerate(tiny.batches(steps=40, rank=accelerator.process_index)):
    loss = model(**{name: ids.to(accelerator.device) for name, ids in batch.items()})["loss"]
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 19:
        accelerator.print(f"step {step + 1}: loss {loss.item():.3f}")
accelerator.end_training()

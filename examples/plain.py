"""One process.

python examples/plain.py

- optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
+ optimizer = pylo_dist.AdafacLO(model.named_parameters(), weights="demo")
"""

import tiny
import torch

import pylo_dist

torch.manual_seed(0)
model = tiny.GPT()
optimizer = pylo_dist.AdafacLO(model.named_parameters(), weights="demo")
for step, batch in enumerate(tiny.batches(steps=60)):
    loss = model(**batch)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss.item():.3f}")

"""timm: its models, its parameter groups and its schedules, which set lr as they do for AdamW.

python examples/timm_vit.py

- optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=3e-4, weight_decay=0.1)
- scheduler, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=40, min_lr=3e-5)
+ optimizer = pylo_dist.AdafacLO(model.named_parameters(), weights="demo")
+ scheduler, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=40, min_lr=0.1)
"""

import timm
import torch
from timm.scheduler import create_scheduler_v2
from torch.nn.functional import cross_entropy

import pylo_dist

CLASSES = 8
torch.manual_seed(0)
model = timm.create_model(
    "vit_tiny_patch16_224",
    img_size=32,
    patch_size=8,
    embed_dim=64,
    num_heads=4,
    depth=2,
    num_classes=CLASSES,
)
optimizer = pylo_dist.AdafacLO(model.named_parameters(), weights="demo")
# the same shape as AdamW's, down from 1; an epoch is one batch here
scheduler, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=40, min_lr=0.1)
patterns = torch.randn(CLASSES, 3, 32, 32)
for step in range(40):
    labels = torch.randint(CLASSES, (32,))
    images = patterns[labels] + torch.randn(32, 3, 32, 32)
    loss = cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step(step + 1)
    if step % 20 == 19 or step == 0:
        print(f"step {step + 1}: loss {loss.item():.3f}")

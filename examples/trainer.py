"""The Trainer of transformers, on one process or under torchrun (DDP).

python examples/trainer.py
torchrun --nproc_per_node=2 examples/trainer.py

- TrainingArguments(learning_rate=3e-4, weight_decay=0.1)
+ TrainingArguments()
+ Trainer(optimizer_cls_and_kwargs=(pylo_dist.AdafacLO, {"weights": "demo"}))

Of TrainingArguments the optimizer gets weight_decay, and not learning_rate: lr is its own, 1 here.
"""

import sys

import tiny
import torch
from transformers import Trainer, TrainingArguments

import pylo_dist

samples = [
    {name: ids[0] for name, ids in batch.items()} for batch in tiny.batches(steps=512, size=1)
]
torch.manual_seed(0)
trainer = Trainer(
    model=tiny.GPT(),
    args=TrainingArguments(
        output_dir=sys.argv[1] if len(sys.argv) > 1 else "runs/trainer",
        per_device_train_batch_size=16,
        max_steps=30,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),  # else ranks on CPUs train a model each
    ),
    train_dataset=samples,
    optimizer_cls_and_kwargs=(pylo_dist.AdafacLO, {"weights": "demo"}),
)
trainer.train()

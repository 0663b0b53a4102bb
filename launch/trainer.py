"""A tiny GPT-2 with the Trainer of transformers and a DeepSpeed JSON that names a learned
optimizer.

    torchrun --nproc_per_node=2 launch/trainer.py --deepspeed launch/deepspeed/trainer.json

The one line that a script of yours needs is `import pylo_dist.deepspeed`: it makes the JSON's
"type" known.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from typing import Any

import torch
import transformers
from data import builtin_text

import pylo_dist.deepspeed


class Bytes(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Windows of the built-in text, a token per byte."""

    def __init__(self, text: bytes, length: int) -> None:
        self.tokens, self.length = torch.tensor(list(text)), length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        window = self.tokens[i * self.length : (i + 1) * self.length]
        return {"input_ids": window, "labels": window}


class Watch(transformers.TrainerCallback):
    """Prints the optimizer's report at the start, to show that it is the one the JSON names."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            held = kwargs["optimizer"]
            # under the wrappers of accelerate and DeepSpeed
            while not isinstance(held, pylo_dist.deepspeed.DeepSpeedOptimizer):
                held = held.optimizer
            print(held.report(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deepspeed", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="runs/trainer")
    parser.add_argument(
        "--local_rank", type=int, help="of DeepSpeed's launcher; in the environment too"
    )
    given = parser.parse_args()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

    arguments = transformers.TrainingArguments(
        output_dir=given.out,
        deepspeed=given.deepspeed,
        # "auto" in the JSON; the default of transformers, 5e-5, is meant for AdamW
        learning_rate=1.0,
        max_steps=given.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    config = transformers.GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Bytes(builtin_text()[0][:200_000], 64),
        callbacks=[Watch()],
    )
    trainer.train()
    sys.stdout.flush()
    sys.stderr.flush()
    # DeepSpeed's modules hold process groups to the end, whose threads then now and then abort the
    # process.
    os._exit(0)


if __name__ == "__main__":
    main()

#!/usr/bin/env bash
# With a DeepSpeed JSON the Trainer of transformers trains with an optimizer of its own in place of the one it was handed.
#
#   findings/trainer_under_deepspeed_drops_optimizers.sh
#
# transformers 5.23.0, deepspeed 0.19.8, accelerate 1.15.0, torch 2.13.0, one process on the CPU. `Trainer(optimizers=(optimizer,
# schedule))` is the documented way to bring an optimizer. Where TrainingArguments have `deepspeed=`, the JSON without an "optimizer"
# section, the pair is exchanged before training for the AdamW of the arguments, without an error. Seen: handed an SGD of rate 0, which
# moves nothing, the model stays as it is without DeepSpeed and moves with it. Exit code 0 as long as that is so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" --disable-pip-version-check install --quiet)
"${pip[@]}" torch==2.13.0 numpy==2.4.6
"${pip[@]}" torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 deepspeed==0.19.8

cat >"$folder/case.py" <<'PY'
import os

import torch
import transformers
from torch import nn

assert transformers.__version__ == "5.23.0", transformers.__version__


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x=None):
        return {"loss": (self.weight * x).square().mean()}


def moved(by):
    model = Model()
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    arguments = transformers.TrainingArguments(
        output_dir=os.environ["FOLDER"], max_steps=1, use_cpu=True, per_device_train_batch_size=1,
        learning_rate=0.125, lr_scheduler_type="constant", report_to=[], save_strategy="no",
        max_grad_norm=0.0, deepspeed=config if by == "deepspeed" else None,
    )
    still = torch.optim.SGD(model.parameters(), lr=0.0)  # moves nothing
    constant = torch.optim.lr_scheduler.ConstantLR(still, 1.0)
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=[{"x": torch.ones(4)}] * 2, optimizers=(still, constant)
    )
    trainer.train()
    return not torch.equal(model.weight.detach().float(), torch.ones(4))


said = {by: "moved" if moved(by) else "not moved" for by in ("plain", "deepspeed")}
print("optimizers=(SGD of lr 0, schedule): " + ", ".join(f"{by}: {what}" for by, what in said.items()))
PY
export FOLDER="$folder/out" DS_ACCELERATOR=cpu TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=1
export MASTER_ADDR=127.0.0.1 MASTER_PORT=29811 RANK=0 LOCAL_RANK=0 WORLD_SIZE=1
seen=$("$folder/venv/bin/python" -W ignore "$folder/case.py" 2>"$folder/errors" | tail -n 1) || cat "$folder/errors" >&2
echo "$seen"
wanted="optimizers=(SGD of lr 0, schedule): plain: not moved, deepspeed: moved"
[ "$seen" = "$wanted" ] || {
  echo "that has changed; wanted: $wanted" >&2
  exit 1
}

#!/usr/bin/env bash
# DeepSpeed's zero_to_fp32 leaves frozen parameters out of a stage 1 checkpoint, and loading its result leaves them random.
#
#   findings/deepspeed_stage1_fp32_weights_lack_frozen_ones.sh
#
# deepspeed 0.19.8, torch 2.13.0, torch's Adam, one process on the CPU. `get_fp32_state_dict_from_zero_checkpoint` is the documented
# way to whole weights, and `load_state_dict_from_zero_checkpoint` puts them into a model. Seen: under stages 2 and 3 they bring the
# frozen layer (all 7) too, under stage 1 neither has it, and the model keeps the values that it was built with (0), without an
# error or a warning. With adapters (LoRA) that is the whole base model. Exit code 0 as long as that is so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" --disable-pip-version-check install --quiet)
"${pip[@]}" torch==2.13.0 numpy==2.4.6 setuptools wheel
DS_BUILD_OPS=0 "${pip[@]}" --no-build-isolation torch==2.13.0 deepspeed==0.19.8

cat >"$folder/case.py" <<'PY'
import os
import socket
import tempfile

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}

import deepspeed
import deepspeed.ops
import torch
from deepspeed.utils import zero_to_fp32
from torch import nn

assert deepspeed.__version__.startswith("0.19.8"), deepspeed.__version__
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # no compiler is needed then
deepspeed.init_distributed("gloo")


def net(frozen):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    nn.init.constant_(model[0].requires_grad_(False).weight, frozen)
    return model


for stage in (1, 2, 3):
    model = net(7.0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": stage},
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder)
        names = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(folder)
        loaded = zero_to_fp32.load_state_dict_from_zero_checkpoint(net(0.0), folder)
    value = loaded[0].weight[0, 0].item()
    print(f"seen: stage {stage}: frozen among the names: {'0.weight' in names}, loaded: {value:g}")
PY
seen=$("$folder/venv/bin/python" -W ignore "$folder/case.py" 2>/dev/null | sed -n 's/^seen: //p')
echo "$seen"
[ "$seen" = "stage 1: frozen among the names: False, loaded: 0
stage 2: frozen among the names: True, loaded: 7
stage 3: frozen among the names: True, loaded: 7" ] || {
  echo "changed: the outcomes above are not those described at the top" >&2
  exit 1
}

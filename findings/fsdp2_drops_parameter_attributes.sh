#!/usr/bin/env bash
# What Python code leaves on a parameter is lost when FSDP2 shards it: mup's own output layer then refuses to run.
#
#   findings/fsdp2_drops_parameter_attributes.sh
#
# torch 2.13.0, mup 1.0.0. `mup.set_base_shapes` keeps its shapes as an attribute, `infshape`, of every parameter.
# `fully_shard` puts new parameters in the place of the old ones and hands no attribute on, neither to the sharded ones nor to
# those it shows during a forward pass. Seen: no parameter has `infshape` any more, and the forward pass of `MuReadout` ends in
# its own AssertionError "Please call set_base_shapes(...)", although it was called. Exit code 0 as long as that is so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" --disable-pip-version-check install --quiet)
"${pip[@]}" torch==2.13.0 numpy==2.4.6 pyyaml==6.0.3 setuptools wheel
"${pip[@]}" --no-deps --no-build-isolation mup==1.0.0

cat >"$folder/case.py" <<'PY'
import mup
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

assert torch.__version__.startswith("2.13.0"), torch.__version__


def net(width):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), mup.MuReadout(width, 2))


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = net(16)
mup.set_base_shapes(model, net(4), delta=net(8))
model(torch.zeros(1, 4))
before = sum(hasattr(p, "infshape") for p in model.parameters())
fully_shard(model)
after = sum(hasattr(p, "infshape") for p in model.parameters())
try:
    model(torch.zeros(1, 4))
    ran = "the forward pass runs"
except AssertionError as error:
    ran = f"the forward pass: AssertionError: {str(error)[:33]}"
print(f"parameters with infshape: {before} before fully_shard, {after} after; {ran}")
dist.destroy_process_group()
PY
seen=$("$folder/venv/bin/python" -W ignore "$folder/case.py" | tail -n 1)
echo "$seen"
wanted="parameters with infshape: 4 before fully_shard, 0 after; the forward pass: AssertionError: Please call set_base_shapes(...)."
[ "$seen" = "$wanted" ] || {
  echo "that has changed; wanted: $wanted" >&2
  exit 1
}

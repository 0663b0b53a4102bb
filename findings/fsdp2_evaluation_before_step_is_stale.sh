#!/usr/bin/env bash
# Under FSDP2 an evaluation between backward and step makes the next training pass compute with the parameters from before the step.
#
#   findings/fsdp2_evaluation_before_step_is_stale.sh
#
# torch 2.13.0, two gloo ranks, torch's own SGD. `fully_shard` keeps what the root has gathered after a forward pass without
# gradients, so that a backward pass need not gather it again. A step then moves the shards, and the next forward pass takes what is
# still gathered. Seen: in the same loop the loss of the pass after the step is the one before the step with an evaluation in
# between, and another one without it, or with `model.reshard()` after the evaluation. Exit code 0 as long as that is so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/case.py" <<'PY'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

assert torch.__version__.startswith("2.13.0"), torch.__version__
dist.init_process_group("gloo")
x = torch.ones(2, 4)


def losses(evaluation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(2):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        found.append(loss.item())
        loss.backward()
        if evaluation != "none" and step == 0:
            with torch.no_grad():
                model(x)
            if evaluation == "resharded":
                model.reshard()
        optimizer.step()
    return found


said = []
for evaluation in ("none", "kept", "resharded"):
    before, after = losses(evaluation)
    said.append(f"{evaluation}: {'the same loss' if before == after else 'another loss'}")
if dist.get_rank() == 0:
    print("after a step, by what an evaluation left: " + ", ".join(said))
dist.destroy_process_group()
PY
export OMP_NUM_THREADS=1
seen=$("$folder/venv/bin/torchrun" --standalone --nproc-per-node 2 "$folder/case.py" 2>"$folder/errors" | tail -n 1) || cat "$folder/errors" >&2
echo "$seen"
wanted="after a step, by what an evaluation left: none: another loss, kept: the same loss, resharded: another loss"
[ "$seen" = "$wanted" ] || {
  echo "that has changed; wanted: $wanted" >&2
  exit 1
}

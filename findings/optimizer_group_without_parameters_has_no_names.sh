#!/usr/bin/env bash
# torch counts a parameter group whose list is empty as one without names, and refuses it beside named ones.
#
#   findings/optimizer_group_without_parameters_has_no_names.sh
#
# torch 2.13.0. With named parameters all groups must have names, or none. A group that comes out empty, as when all of a part of
# a model was filtered out for being frozen, has neither: it is accepted alone, and beside a named group the constructor says
# "all optimizer param groups should be with/without names", which names no group. Exit code 0 as long as that is so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/case.py" <<'PY'
import torch
from torch import nn

assert torch.__version__.startswith("2.13.0"), torch.__version__
model = nn.ModuleDict({"frozen": nn.Linear(2, 2).requires_grad_(False), "head": nn.Linear(2, 2)})


def trainable(part):
    return [(f"{part}.{n}", p) for n, p in model[part].named_parameters() if p.requires_grad]


def outcome(*groups):
    try:
        torch.optim.AdamW([{"params": group} for group in groups])
        return "accepted"
    except ValueError as error:
        return f"ValueError: {error}"


print("empty:", outcome([]))
print("named, then empty:", outcome(trainable("head"), trainable("frozen")))
PY
seen=$("$folder/venv/bin/python" -W ignore "$folder/case.py")
echo "$seen"
wanted="empty: accepted
named, then empty: ValueError: all optimizer param groups should be with/without names. cannot add param group without names to the optimizer"
[ "$seen" = "$wanted" ] || {
  echo "that has changed; wanted:" >&2
  echo "$wanted" >&2
  exit 1
}

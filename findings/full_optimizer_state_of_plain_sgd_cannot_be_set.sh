#!/usr/bin/env bash
# torch's set_optimizer_state_dict takes no full state of an optimizer without tensors, as SGD without momentum, that its counterpart gave.
#
#   findings/full_optimizer_state_of_plain_sgd_cannot_be_set.sh
#
# torch 2.13.0, one process on the CPU (2.15.0 and a model under fully_shard do the same). With `StateDictOptions(full_state_dict=True)`
# `get_optimizer_state_dict` returns the state of plain SGD, and `set_optimizer_state_dict` ends on that very dict in
# "AssertionError: Expected device to be set": the learning rate cannot come back. Without the option, or with momentum, which leaves a
# tensor to read a device from, it works. Exit code 0 as long as that is so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/case.py" <<'PY'
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

assert torch.__version__.startswith("2.13.0"), torch.__version__


def trained(**kwargs):
    model = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), **kwargs)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


for momentum in (0.0, 0.9):
    for full in (False, True):
        options = StateDictOptions(full_state_dict=full)
        state = get_optimizer_state_dict(*trained(lr=0.5, momentum=momentum), options=options)
        model, other = trained(lr=0.1, momentum=momentum)
        seen = "works"
        try:
            set_optimizer_state_dict(model, other, state, options=options)
        except AssertionError as error:
            seen = f"AssertionError: {error}"
        lr = other.param_groups[0]["lr"]
        print(f"momentum {momentum}, full_state_dict={full}: {seen}, lr {lr}")
        fails = full and momentum == 0
        assert (seen == "AssertionError: Expected device to be set") if fails else seen == "works", seen
        assert fails or lr == 0.5, lr
PY
"$folder/venv/bin/python" -W ignore "$folder/case.py"

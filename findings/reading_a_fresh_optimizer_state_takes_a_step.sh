#!/usr/bin/env bash
# torch's get_optimizer_state_dict, called before the first step, takes a step of its own, and training goes another way from there on.
#
#   findings/reading_a_fresh_optimizer_state_takes_a_step.sh
#
# torch 2.13.0, one process on the CPU. It reads a state, as for a checkpoint of step 0; where there is none yet it steps the optimizer
# with zero gradients and a learning rate of 0, and leaves what that made. No parameter moves, but AdamW stands at step 1 with moments of
# nothing, so its bias corrections are those of a step later: parameters differ after the next steps, by half a step (5e-4 at lr 1e-3).
# SGD with momentum and weight decay begins with a momentum of the decay; hooks on steps run. What makes its state when it is built
# (Adagrad) is left alone, and Optimizer.state_dict() changes nothing. Exit code 0 as long as that is so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/case.py" <<'PY'
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

assert torch.__version__.startswith("2.13.0"), torch.__version__


def trained(make, read):
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    optimizer = make(model.parameters())
    hooks = []
    optimizer.register_step_post_hook(lambda *_: hooks.append(1))
    before = [param.detach().clone() for param in model.parameters()]
    read(model, optimizer)
    assert all(map(torch.equal, before, model.parameters()))
    first = next(iter(optimizer.state.values()), {})
    seen = len(hooks), {key: float(value.abs().max()) for key, value in first.items()}
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    return [param.detach() for param in model.parameters()], seen


OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=0.1),
    "Adagrad": torch.optim.Adagrad,
}
READERS = {
    "nothing": lambda model, optimizer: None,
    "Optimizer.state_dict": lambda model, optimizer: optimizer.state_dict(),
    "get_optimizer_state_dict": get_optimizer_state_dict,
}
for name, make in OPTIMIZERS.items():
    wanted, _ = trained(make, READERS["nothing"])
    for reader, read in READERS.items():
        params, (hooks, state) = trained(make, read)
        apart = max(float((a - b).abs().max()) for a, b in zip(wanted, params))
        count = state.get("step", "-")
        print(f"{name}, {reader}: {hooks} hooks ran, step {count}, parameters {apart:.1e} apart after 3 steps")
        steps = reader == "get_optimizer_state_dict" and name != "Adagrad"
        assert hooks == steps and (apart > 0) == steps
        if steps and name == "AdamW":
            assert count == 1 and apart > 2e-4, (count, apart)
        if steps and name == "SGD":
            assert state["momentum_buffer"] > 0
PY
"$folder/venv/bin/python" -W ignore "$folder/case.py"

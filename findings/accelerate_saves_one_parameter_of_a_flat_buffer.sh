#!/usr/bin/env bash
# accelerate's save_model writes one of many parameters that lie side by side in one buffer, and loading leaves the others random.
#
#   findings/accelerate_saves_one_parameter_of_a_flat_buffer.sh
#
# accelerate 1.15.0, torch 2.13.0, safetensors 0.8.0. Parameters as views of one flat buffer are what sharded and fused optimizers make of
# a model; no two of these four share an element. save_model takes tensors of one storage for tied ones, keeps the first name and drops the
# rest; a log line says that this "should be OK", and to look for a warning while reloading. The file has 1 of 4 tensors.
# load_checkpoint_in_model into a model of the same kind gives no warning and raises nothing: the other three keep their random numbers.
# safetensors' own save_model refuses the same model with a RuntimeError, and a storage of its own per parameter (dlpack over the same
# memory) is written whole. Exit code 0 as long as that is so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet torch==2.13.0 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6

cat >"$folder/case.py" <<'PY'
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator, load_checkpoint_in_model
from safetensors import safe_open
from safetensors.torch import save_model
from torch import nn

FOLDER = Path(sys.argv[1])
NAMES = {"0.weight", "0.bias", "1.weight", "1.bias"}


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def flat(of: nn.Module, apart: bool) -> nn.Module:
    """The same model with its parameters side by side in one buffer; `apart`: as storages of their own."""
    buffer = torch.cat([p.detach().reshape(-1) for p in of.parameters()])
    first = 0
    for p in of.parameters():
        view = buffer[first : first + p.numel()].view(p.shape)
        p.data = torch.utils.dlpack.from_dlpack(view) if apart else view
        first += p.numel()
    return of


def written(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


assert (version("accelerate"), version("safetensors")) == ("1.15.0", "0.8.0")
assert torch.__version__.startswith("2.13.0"), torch.__version__
one, apart = FOLDER / "one", FOLDER / "apart"
Accelerator(cpu=True).save_model(flat(model(0), False), one)
Accelerator(cpu=True).save_model(flat(model(0), True), apart)
print("one storage:", sorted(written(one)), "of", sorted(NAMES))
assert written(one) == {"0.weight"}
assert written(apart) == NAMES

for folder, wanted in ((one, {"0.weight"}), (apart, NAMES)):
    loaded = model(1)
    load_checkpoint_in_model(loaded, folder)
    saved = dict(model(0).named_parameters())
    alike = {name for name, p in loaded.named_parameters() if torch.equal(p, saved[name])}
    print(folder.name, "loads", sorted(alike))
    assert alike == wanted

try:
    save_model(flat(model(0), False), FOLDER / "refused.safetensors")
except RuntimeError as error:
    print("safetensors:", str(error)[:100])
else:
    raise AssertionError("safetensors.torch.save_model refuses such a model")
PY
"$folder/venv/bin/python" -W ignore "$folder/case.py" "$folder"

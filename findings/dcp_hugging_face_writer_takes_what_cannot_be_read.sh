#!/usr/bin/env bash
# torch.distributed.checkpoint's HuggingFaceStorageWriter accepts a number beside tensors and writes a folder that nothing can read.
#
#   findings/dcp_hugging_face_writer_takes_what_cannot_be_read.sh
#
# torch 2.13.0, safetensors 0.8.0, one process on the CPU. `dcp.save` pickles what is no tensor; this writer puts the pickle into a
# file that it names model-00001-of-00001.safetensors. Seen: a state dict with one number in it, or an optimizer's, is saved without
# an error or a warning, and `dcp.load` with HuggingFaceStorageReader then ends in "header too large", the tensors lost with it; the
# tensors alone come back. Exit code 0 as long as that is so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0

cat >"$folder/case.py" <<'PY'
import tempfile

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

assert torch.__version__.startswith("2.13.0"), torch.__version__
model = nn.Linear(4, 3)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 4)).sum().backward()
optimizer.step()


def outcome(state):
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(folder), no_dist=True)
        try:
            dcp.load(state, storage_reader=HuggingFaceStorageReader(folder), no_dist=True)
        except BaseException as error:  # of torch's, no Exception
            return "saved, " + ("header too large" if "header too large" in str(error) else repr(error))
    return "saved and read"


print("tensors:", outcome(model.state_dict()))
print("tensors and a number:", outcome({**model.state_dict(), "epoch": 3}))
print("an optimizer's state:", outcome(optimizer.state_dict()))
PY
seen=$("$folder/venv/bin/python" -W ignore "$folder/case.py" 2>/dev/null)
echo "$seen"
[ "$seen" = "tensors: saved and read
tensors and a number: saved, header too large
an optimizer's state: saved, header too large" ] || {
  echo "changed: the outcomes above are not those described at the top" >&2
  exit 1
}

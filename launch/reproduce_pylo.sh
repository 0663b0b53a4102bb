#!/usr/bin/env bash
# The comparison published with PyLO, GPT-2 355M on 10 billion tokens of FineWeb-Edu: VeLO, MuLO and AdamW, one after the other,
# by launch/recipes/gpt2-355m-pylo.yaml and gpt2-355m-pylo-adamw.yaml. Needs GPUs, a network (or what an earlier call has brought)
# and 25 GB of disk; not yet run. Everything lies in one folder; called again, it goes on where it was.
#
#   launch/reproduce_pylo.sh [FOLDER] [FLAG ...]     default: runs/pylo; further flags go to gpt2.py, e.g. --grad-scale 524288
#
# Exit code 0: done, with a table of losses. 1: something is missing, each named on a line of its own, and nothing has been trained;
# or one of the three runs has failed, and the table holds the others. 143: stopped by a signal.
set -uo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 1

folder=runs/pylo
case ${1:-} in
  "" | -*) ;;
  *)
    folder=$1
    shift
    ;;
esac
python=${PYTHON:-.venv/bin/python}
dataset=btherien/edufineweb-tokenized tokens=10000000000
declare -A weights=([velo]=Pauljanson002/VeLO_RNN+Pauljanson002/VeLO_MLP [mulo]=btherien/mulo)

missing=()
lacks() { missing+=("$*"); }

if [ ! -x "$(command -v "$python")" ]; then
  echo "reproduce_pylo.sh: no $python: launch/setup.sh launch" >&2
  exit 1
fi
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())') || gpus=0
[[ $gpus =~ ^[0-9]{1,4}$ ]] || gpus=0 # it is computed with
[ "$gpus" -gt 0 ] || lacks "a GPU: PyTorch sees none (355M parameters and 10 billion tokens are out of a CPU's reach)"
[ "$gpus" -eq 0 ] || [ $((512 % gpus)) -eq 0 ] ||
  lacks "a number of GPUs that divides the 512 sequences of a step: PyTorch sees $gpus; set CUDA_VISIBLE_DEVICES"
for name in "${!weights[@]}"; do
  if [ -d "$folder/weights/$name" ]; then
    said=$("$python" -m pylo_dist weights verify "$folder/weights/$name" 2>&1) || lacks "sound weights: ${said##*$'\n'}"
  else
    aside=$folder/weights/.$name # half of it, where an earlier call was killed
    rm -rf -- "$aside"
    if said=$("$python" -m pylo_dist weights fetch "${weights[$name]}" --to "$aside" 2>&1); then
      mv -- "$aside" "$folder/weights/$name"
    else
      lacks "weights ${weights[$name]}: ${said##*$'\n'}"
    fi
  fi
done
# a long download is begun only where all else is there
if [ ${#missing[@]} -eq 0 ]; then
  "$python" launch/download_tokens.py "$dataset" --tokens $tokens --out "$folder/tokens" ||
    lacks "tokens: $dataset could not be brought whole, see above"
elif [ ! -e "$folder/tokens/tokens.json" ]; then
  lacks "tokens: $dataset is not in $folder/tokens yet; it is downloaded when all else is there"
fi
if [ ${#missing[@]} -eq 0 ]; then
  said=$("$python" launch/prepare_data.py --check "$folder/tokens" 2>&1) || lacks "sound tokens: $said"
fi
if [ ${#missing[@]} -gt 0 ]; then
  for line in "${missing[@]}"; do echo "reproduce_pylo.sh: missing: $line" >&2; done
  echo "reproduce_pylo.sh: nothing was trained" >&2
  exit 1
fi

export OMP_NUM_THREADS=1
failed=0
for name in velo mulo adamw; do
  case $name in
    velo) flags=(--recipe launch/recipes/gpt2-355m-pylo.yaml --weights "$folder/weights/velo") ;;
    mulo)
      flags=(--recipe launch/recipes/gpt2-355m-pylo.yaml --optimizer mulo --mup-base-width 1 --mup-base-heads 1)
      flags+=(--weights "$folder/weights/mulo")
      ;;
    adamw) flags=(--recipe launch/recipes/gpt2-355m-pylo-adamw.yaml) ;;
  esac
  launch/resume_loop.sh "$python" -m torch.distributed.run --standalone --nproc-per-node="$gpus" launch/gpt2.py "${flags[@]}" \
    --data "$folder/tokens" --save-every 500 --out "$folder/$name" "$@"
  code=$?
  [ $code -eq 143 ] && exit 143
  [ $code -eq 0 ] || failed=1
done
"$python" - "$folder" <<'PYTHON' || failed=1
import json
import sys
from pathlib import Path

published = {"velo": 2.89, "mulo": 3.18, "adamw": 2.91}
print("optimizer  train loss (mean of the last 100 steps)  validation  published")
for name, there in published.items():
    path = Path(sys.argv[1]) / name / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    if not rows:
        print(f"{name:9}  no rows")
        continue
    tail = [row["loss"] for row in rows[-100:]]
    val = [row["val_loss"] for row in rows if "val_loss" in row]
    print(f"{name:9}  {sum(tail) / len(tail):.4f}  {val[-1] if val else float('nan'):.4f}  {there}")
PYTHON
exit $failed

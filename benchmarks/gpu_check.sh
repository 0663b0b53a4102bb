#!/usr/bin/env bash
# Everything that only a machine with a GPU can show, in one command and within ten minutes:
#
#   benchmarks/gpu_check.sh              PYTHON names the interpreter (default: .venv/bin/python, else python3); it must have torch
#   PYLO_DIR=../pylo benchmarks/gpu_check.sh        also PyLO's plain classes against its CUDA classes
#
# Builds the extensions in place with the torch that is there (no network is used), runs the tests, real ranks, the sanitizer, the
# benchmarks and a profile. Writes benchmarks/results/gpu_<device>.json, and a log of every part to runs/gpu_check; a short table last.
# Exit code 0 if every part that could run succeeded. Without a GPU: compile checks for all architectures, then 0.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  [ -x .venv/bin/python ] && python=.venv/bin/python
fi
logs=runs/gpu_check
mkdir -p "$logs"
rm -f "$logs"/*
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=1
began=$SECONDS
most=590 # seconds, with a GPU
failed=0

# part NAME SECONDS COMMAND...: runs it for at most that long, its output in a log, its result as a line of parts.tsv
part() {
  local name=$1 limit=$2 start=$SECONDS code=0 result=ok
  shift 2
  local left=$((most - (SECONDS - began)))
  if [ "$left" -lt 5 ]; then
    skip "$name" "the ten minutes are over"
    failed=1
    return 1
  fi
  [ "$limit" -gt "$left" ] && limit=$left
  echo "== $name" >&2
  timeout "$limit" "$@" >"$logs/$name.log" 2>&1 || code=$?
  if [ "$code" -ne 0 ]; then
    result="failed ($code)"
    [ "$code" -eq 124 ] && result="stopped after $limit s"
    failed=1
    tail -n 15 "$logs/$name.log" >&2
  fi
  printf '%s\t%s\t%s\n' "$name" "$result" "$((SECONDS - start))" >>"$logs/parts.tsv"
  return "$code"
}

skip() {
  echo "== $1: $2" >&2
  printf '%s\t%s\t0\n' "$1" "not run: $2" >>"$logs/parts.tsv"
}

summary() {
  "$python" - "$logs" "$((SECONDS - began))" <<'PY'
import json
import sys
from pathlib import Path

logs, seconds = Path(sys.argv[1]), int(sys.argv[2])
parts = [line.split("\t") for line in (logs / "parts.tsv").read_text().splitlines()]
result = {"seconds": seconds, "parts": {name: {"result": said, "seconds": int(took)} for name, said, took in parts}}
try:
    import torch

    result["torch"] = torch.__version__
    result["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
except ImportError:
    result["torch"] = result["device"] = None
try:
    sys.path.insert(0, "benchmarks")
    from bench_demo import environment

    result.update(environment())
except Exception as error:
    result["environment"] = f"unknown: {error}"
for name in ("kernels", "graph", "parity"):
    lines = (logs / f"{name}.log").read_text().splitlines() if (logs / f"{name}.log").exists() else []
    found = [line for line in lines if line.startswith("{")]
    if found:
        result[name] = json.loads(found[-1])
if (logs / "step.json").exists():
    result["step"] = json.loads((logs / "step.json").read_text())
device = "none" if result["device"] is None else "".join(c if c.isalnum() else "_" for c in result["device"])
out = Path("benchmarks/results") / f"gpu_{device}.json"
if result["device"] is not None:
    out.write_text(json.dumps(result, indent=2) + "\n")
width = max(len(name) for name, *_ in parts)
for name, said, took in parts:
    print(f"{name:<{width}}  {said}  {took} s")
for case, row in result.get("kernels", {}).items():
    print(f"{case:<{width}}  {row['ms in all']} ms a step, {row['launches of the passes']:g} launches of the passes")
for case, row in result.get("graph", {}).items():
    print(f"graph {case:<{width - 6}}  {row['launched, ms']} ms launched, {row['replayed, ms']} ms replayed")
for case, figure in result.get("parity", {}).items():
    print(f"{case}: {figure}")
print(f"{seconds} s in all" + (f", {out}" if result["device"] is not None else ""))
PY
}

nvcc=nvcc
[ -n "${CUDA_HOME:-}" ] && nvcc=$CUDA_HOME/bin/nvcc
has_nvcc=1
command -v "$nvcc" >/dev/null 2>&1 || has_nvcc=0
has_gpu=0
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1 && has_gpu=1

if [ "$has_gpu" -eq 0 ]; then
  most=3600
  echo "no GPU that torch can use: only the compile checks are made" >&2
  if [ "$has_nvcc" -eq 1 ]; then
    for arch in 80 90 100; do
      part "compile_sm_$arch" 900 env PYLO_DIST_CUDA_ARCH="$arch" "$python" -m pytest -q tests/test_cuda_build.py
    done
  else
    skip compile "no nvcc"
  fi
  summary
  exit "$failed"
fi

# the device's own architecture: three take as many minutes
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
if [ "$has_nvcc" -eq 1 ]; then
  part build 240 env PYLO_DIST_CUDA=1 PYLO_DIST_CUDA_ARCH="$arch" "$python" setup.py --quiet build_ext --inplace --force
else
  skip build "no nvcc; what is built already is used"
fi
parallel=()
"$python" -c 'import xdist' >/dev/null 2>&1 && parallel=(--numprocesses 6)
part doctor 60 "$python" -m pylo_dist doctor
part tests_gpu 180 "$python" -m pytest -q ${parallel[@]+"${parallel[@]}"} tests/test_gpu.py -k "not real_ranks"
part ranks 90 "$python" -m pytest -q tests/test_gpu.py -k real_ranks
part tests_passes 100 "$python" -m pytest -q ${parallel[@]+"${parallel[@]}"} tests/test_lanes.py tests/test_kernels.py
if command -v compute-sanitizer >/dev/null 2>&1; then
  small=(-m pytest -q tests/test_gpu.py -k "nan_and_extremes or 16_bits and bfloat16")
  for tool in memcheck racecheck; do
    part "sanitizer_$tool" 100 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --kernel-regex kns=pylo_dist "$python" "${small[@]}"
  done
else
  skip sanitizer "no compute-sanitizer"
fi
part kernels 90 "$python" benchmarks/gpu_kernels.py kernels
part graph 60 "$python" benchmarks/gpu_kernels.py graph
part step 150 "$python" benchmarks/bench_step.py --device cuda --out "$logs/step.json" ${PYLO_DIR:+--pylo "$PYLO_DIR"}
if [ -n "${PYLO_DIR:-}" ]; then
  part parity 90 "$python" benchmarks/gpu_kernels.py parity
else
  skip parity "PYLO_DIR names no folder"
fi
if command -v ncu >/dev/null 2>&1; then
  part profile 90 ncu --kernel-name "regex:tensor_core_kernel" --launch-count 1 --set basic \
    "$python" benchmarks/gpu_kernels.py once small_fc high
else
  skip profile "no ncu"
fi
summary
exit "$failed"

#!/usr/bin/env bash
# Everything that only a machine with a GPU can show, in one command and within ten minutes:
#
#   benchmarks/gpu_check.sh              PYTHON names the interpreter (default: .venv/bin/python, else python3); it must have torch
#   PYLO_DIR=../pylo benchmarks/gpu_check.sh        also PyLO's plain classes against its CUDA classes
#
# Builds the extensions in place with the torch that is there (no network is used), runs the tests, real ranks, the sanitizer, the
# benchmarks and a profile. The tests that need no GPU run beside those that do, but not beside a measurement. Writes
# benchmarks/results/gpu_<device>_torch<version>.json, and a log of every part to runs/gpu_check; a short table last.
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
rm -rf "${logs:?}"/*
# the interpreter may be one that launch/setup.sh has not set up
export PYTHONPATH="$PWD:$PWD/launch:$PWD/benchmarks:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=1
began=$SECONDS
most=590 # seconds, with a GPU

# part NAME SECONDS COMMAND...: runs it for at most that long, its output in a log, its result as a line of parts.tsv
part() {
  local name=$1 limit=$2 start=$SECONDS code=0 result=ok
  shift 2
  local left=$((most - (SECONDS - began) - 10)) # ten for the summary
  if [ "$left" -lt 5 ]; then
    echo "== $name: the ten minutes are over" >&2
    printf '%s\tno time left\t0\n' "$name" >>"$logs/parts.tsv"
    return 1
  fi
  [ "$limit" -gt "$left" ] && limit=$left
  echo "== $name" >&2
  timeout --kill-after=5 "$limit" "$@" >"$logs/$name.log" 2>&1 || code=$?
  if [ "$code" -ne 0 ]; then
    result="failed ($code)"
    { [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; } && result="stopped after $limit s"
    { echo "== $name: $result" && tail -n 15 "$logs/$name.log"; } >&2
  fi
  printf '%s\t%s\t%s\n' "$name" "$result" "$((SECONDS - start))" >>"$logs/parts.tsv"
  return "$code"
}

skip() {
  echo "== $1: not run: $2" >&2
  printf '%s\tnot run: %s\t0\n' "$1" "$2" >>"$logs/parts.tsv"
}

# works SECONDS COMMAND...: whether a tool can do anything here at all
works() {
  timeout --kill-after=5 "$@" >"$logs/probe.log" 2>&1
}

# Prints the table, writes the results file; 1 if a part failed.
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
out = None
if result["device"] is not None:
    device, version = ("".join(c if c.isalnum() else "_" for c in result[key]) for key in ("device", "torch"))
    out = Path("benchmarks/results") / f"gpu_{device}_torch{version}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
width = max(len(name) for name, *_ in parts)
for name, said, took in parts:
    print(f"{name:<{width}}  {said}  {took} s")
for case, row in result.get("kernels", {}).items():
    print(f"{case:<{width}}  {row['ms in all']} ms a step, {row['launches of the passes']:g} launches of the passes")
for case, row in result.get("graph", {}).items():
    print(f"graph {case:<{width - 6}}  {row['launched, ms']} ms launched, {row['replayed, ms']} ms replayed")
for model, entry in result.get("step", {}).get("lists", {}).items():
    rows = {name: row.get("ms") for name, row in entry.get("ns_per_parameter", {}).items()}
    print(f"{model}, ms: " + ", ".join(f"{name} {ms}" for name, ms in rows.items()))
for case, figure in result.get("parity", {}).items():
    print(f"{case}: {figure}")
print(f"{seconds} s in all" + (f", {out}" if out else ""))
sys.exit(any(not said.startswith(("ok", "not run")) for _, said, _ in parts))
PY
}

if ! missing=$("$python" -c '
import importlib.util as u
print(*(n for n in ("torch", "numpy", "safetensors", "huggingface_hub", "pytest", "setuptools") if u.find_spec(n) is None))'); then
  echo "no Python: PYTHON names the interpreter, which was $python" >&2
  exit 1
fi
nvcc=nvcc
[ -n "${CUDA_HOME:-}" ] && nvcc=$CUDA_HOME/bin/nvcc
has_nvcc=1
command -v "$nvcc" >/dev/null 2>&1 || has_nvcc=0
has_gpu=0
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1 && has_gpu=1

if [ "$has_gpu" -eq 0 ]; then
  most=3600
  echo "no GPU that torch can use: only the compile checks are made" >&2
  if [ "$has_nvcc" -eq 0 ]; then
    skip compile "no nvcc"
  elif [[ " $missing " == *" torch "* || " $missing " == *" pytest "* ]]; then
    skip compile "$python lacks: $missing"
  else
    for arch in 80 90 100; do
      part "compile_sm_$arch" 900 env PYLO_DIST_CUDA_ARCH="$arch" "$python" -m pytest -q tests/maths/test_cuda_build.py
    done
  fi
  summary
  exit
fi

for name in torch numpy safetensors huggingface_hub; do
  if [[ " $missing " == *" $name "* ]]; then
    echo "$python has no $name, which pylo_dist needs; install it, this script uses no network" >&2
    exit 1
  fi
done

# The device's own architecture: three take as many minutes. In a copy without pyproject.toml, which old setuptools cannot read.
build() {
  local arch copy=$logs/build
  arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return 1
  mkdir -p "$copy/pylo_dist" && cp -r setup.py csrc "$copy" || return 1
  (cd "$copy" && PYLO_DIST_CUDA=1 PYLO_DIST_CUDA_ARCH="$arch" "$python" setup.py --quiet build_ext --inplace --force) &&
    cp "$copy"/pylo_dist/_kernels_* pylo_dist/ && rm -rf "$copy"
}
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac # the build changes folders
export -f build
export python logs
if [ "$has_nvcc" -eq 0 ]; then
  skip build "no nvcc; what is built already is used"
elif [[ " $missing " == *" setuptools "* ]]; then
  skip build "$python has no setuptools; what is built already is used"
else
  part build 240 bash -c build
fi
part doctor 60 "$python" -m pylo_dist doctor

cores=$(nproc)
parallel=() most_of=()
if "$python" -c 'import xdist' >/dev/null 2>&1; then
  parallel=(--numprocesses $((cores > 8 ? 4 : 2)))
  most_of=(--numprocesses $((cores > 8 ? cores - 4 : cores)) --dist worksteal)
fi
suite=
if [[ " $missing " == *" pytest "* ]]; then
  skip tests "$python has no pytest"
else
  # without the GPU, as on any machine; tests/launch has installations to make, the build was checked above
  part tests_cpu 240 env CUDA_VISIBLE_DEVICES= "$python" -m pytest -q -p no:cacheprovider ${most_of[@]+"${most_of[@]}"} tests \
    --ignore tests/launch --ignore tests/maths/test_cuda_build.py --ignore tests/maths/test_gpu.py &
  suite=$!
  part tests_gpu 150 "$python" -m pytest -q ${parallel[@]+"${parallel[@]}"} tests/maths/test_gpu.py -k "not real_ranks"
  part ranks 90 "$python" -m pytest -q tests/maths/test_gpu.py -k real_ranks
  once=("$python" -c "import torch; torch.ones(8, device='cuda').sum().item()")
  if ! command -v compute-sanitizer >/dev/null 2>&1; then
    skip sanitizer "no compute-sanitizer"
  elif ! works 45 compute-sanitizer --error-exitcode 9 "${once[@]}"; then
    skip sanitizer "compute-sanitizer cannot watch this device, see probe.log"
    cp "$logs/probe.log" "$logs/sanitizer.log"
  else
    small=(-m pytest -q tests/maths/test_gpu.py -k "nan_and_extremes or 16_bits and bfloat16")
    for tool in memcheck racecheck; do
      part "sanitizer_$tool" 80 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        --kernel-regex kns=pylo_dist "$python" "${small[@]}"
    done
  fi
fi
[ -n "$suite" ] && wait "$suite" # figures are taken on an idle machine
part step 150 "$python" benchmarks/bench_step.py --device cuda --out "$logs/step.json" ${PYLO_DIR:+--pylo "$PYLO_DIR"}
part graph 60 "$python" benchmarks/gpu_kernels.py graph
part kernels 60 "$python" benchmarks/gpu_kernels.py kernels
if [ -n "${PYLO_DIR:-}" ]; then
  part parity 60 "$python" benchmarks/gpu_kernels.py parity
else
  skip parity "PYLO_DIR names no folder"
fi
if ! command -v ncu >/dev/null 2>&1; then
  skip profile "no ncu"
elif ! works 45 ncu --launch-count 1 --set basic "$python" -c "import torch; torch.ones(8, device='cuda').sum().item()"; then
  skip profile "ncu cannot profile this device, see probe.log"
else
  part profile 60 ncu --kernel-name "regex:tensor_core_kernel" --launch-count 1 --set basic \
    "$python" benchmarks/gpu_kernels.py once small_fc high
fi
summary

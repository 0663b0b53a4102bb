#!/usr/bin/env bash
# Everything that only a machine with a GPU can show, in one command and within ten minutes:
#
#   benchmarks/gpu_check.sh [--out FOLDER]     PYTHON names the interpreter (default: .venv/bin/python, else python3); it must have torch
#   PYLO_DIR=../pylo benchmarks/gpu_check.sh   also PyLO's plain classes against its CUDA classes
#
# Builds the extensions in place with the torch that is there (no network is used), runs the GPU's tests, the benchmarks, a profile, real
# ranks and the sanitizer. What matters most comes first; a part for which no time is left, or whose tool the machine refuses, says "not
# run" and is no failure. The tests that need no GPU run last, beside ranks and sanitizer, never beside a measurement. Writes
# benchmarks/results/gpu_<device>_torch<version>.json, a log of every part to runs/gpu_check, and both into one archive,
# FOLDER/gpu_check_<device>_torch<version>.tar.gz (default: runs); a short table last.
# Exit code 0 if every part that could run succeeded. Without a GPU: compile checks for all architectures, then 0.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

out=runs
case $#:${1:-} in
0:) ;;
2:--out) out=$2 ;;
*)
  echo "usage: benchmarks/gpu_check.sh [--out FOLDER]" >&2
  exit 2
  ;;
esac
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
most=560 # seconds, with a GPU

# seconds, but for ten that the summary takes
left() {
  echo $((most - (SECONDS - began) - 10))
}

# part NAME SECONDS COMMAND...: runs it for at most that long, its output in a log, its result as a line of parts.tsv
part() {
  local name=$1 limit=$2 wanted=$2 start=$((SECONDS - began)) code=0 result=ok
  shift 2
  if [ "$(left)" -lt 5 ]; then
    skip "$name" "no time left"
    return
  fi
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  echo "== $name" >&2
  timeout --kill-after=5 "$limit" "$@" >"$logs/$name.log" 2>&1 || code=$?
  if [ "$code" -ne 0 ]; then
    result="failed ($code)"
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
      result="stopped after $limit s"
      [ "$limit" -lt "$wanted" ] && result="not run to its end: $limit s were left" && code=0
    fi
    { echo "== $name: $result" && tail -n 15 "$logs/$name.log"; } >&2
  fi
  printf '%s\t%s\t%s\t%s\n' "$name" "$result" "$start" "$((SECONDS - began - start))" >>"$logs/parts.tsv"
  return "$code"
}

skip() {
  echo "== $1: not run: $2" >&2
  printf '%s\tnot run: %s\t%s\t0\n' "$1" "$2" "$((SECONDS - began))" >>"$logs/parts.tsv"
}

# works SECONDS COMMAND...: whether a tool can do anything here at all; not asked where that takes the time of the part itself
works() {
  [ "$(left)" -lt "$1" ] || timeout --kill-after=5 "$@" >"$logs/probe.log" 2>&1
}

# Prints the table, writes the results file and the archive; 1 if a part failed.
summary() {
  "$python" benchmarks/gpu_summary.py "$logs" "$((SECONDS - began))" "$out" "$device"
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
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2>/dev/null)

if [ -z "$device" ]; then
  most=3600
  echo "no GPU that torch can use: only the compile checks are made" >&2
  if command -v nvidia-smi >/dev/null 2>&1; then
    part device 20 nvidia-smi # it may say why
  fi
  if [ "$has_nvcc" -eq 0 ]; then
    skip compile "no nvcc"
  elif [[ " $missing " == *" torch "* || " $missing " == *" pytest "* ]]; then
    skip compile "$python lacks: $missing"
  else
    for arch in 80 86 90 100 120; do
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
if command -v nvidia-smi >/dev/null 2>&1; then
  part device 20 nvidia-smi
else
  skip device "no nvidia-smi"
fi
if [ "$has_nvcc" -eq 0 ]; then
  skip build "no nvcc; what is built already is used"
elif [[ " $missing " == *" setuptools "* ]]; then
  skip build "$python has no setuptools; what is built already is used"
else
  part build 180 bash -c build
fi
part doctor 30 "$python" -m pylo_dist doctor

cores=$(nproc)
parallel=() most_of=()
if "$python" -c 'import xdist' >/dev/null 2>&1; then
  parallel=(--numprocesses $((cores > 8 ? 4 : 2)))
  most_of=(--numprocesses $((cores > 8 ? cores - 4 : cores)) --dist worksteal)
fi
once=("$python" -c "import torch; torch.ones(8, device='cuda').sum().item()")

if [[ " $missing " == *" pytest "* ]]; then
  skip tests_gpu "$python has no pytest"
else
  part tests_gpu 150 "$python" -m pytest -q ${parallel[@]+"${parallel[@]}"} tests/maths/test_gpu.py -k "not real_ranks"
fi
part step 90 "$python" benchmarks/bench_step.py --device cuda --out "$logs/step.json" ${PYLO_DIR:+--pylo "$PYLO_DIR"}
part kernels 45 "$python" benchmarks/gpu_kernels.py kernels
part graph 45 "$python" benchmarks/gpu_kernels.py graph
if [ -n "${PYLO_DIR:-}" ]; then
  part parity 45 "$python" benchmarks/gpu_kernels.py parity
else
  skip parity "PYLO_DIR names no folder"
fi
# a container may forbid what these tools need; clocks stay as they are
if ! command -v ncu >/dev/null 2>&1; then
  skip profile "no ncu"
elif ! works 30 ncu --clock-control none --launch-count 1 --set basic "${once[@]}"; then
  skip profile "ncu cannot profile this device, see profile.log"
  cp "$logs/probe.log" "$logs/profile.log"
else
  part profile 60 ncu --clock-control none --kernel-name "regex:tensor_core_kernel" --launch-count 1 --set basic \
    "$python" benchmarks/gpu_kernels.py once small_fc high
fi

if [[ " $missing " == *" pytest "* ]]; then
  skip ranks "$python has no pytest"
  skip sanitizer "$python has no pytest"
  skip tests_cpu "$python has no pytest"
else
  # without the GPU, as on any machine; tests/launch has installations to make, the build was checked above
  part tests_cpu 240 env CUDA_VISIBLE_DEVICES= "$python" -m pytest -q -p no:cacheprovider ${most_of[@]+"${most_of[@]}"} tests \
    --ignore tests/launch --ignore tests/test_scripts.py --ignore tests/maths/test_cuda_build.py --ignore tests/maths/test_gpu.py &
  suite=$!
  part ranks 90 "$python" -m pytest -q tests/maths/test_gpu.py -k real_ranks
  if ! command -v compute-sanitizer >/dev/null 2>&1; then
    skip sanitizer "no compute-sanitizer"
  elif ! works 45 compute-sanitizer --error-exitcode 9 "${once[@]}"; then
    skip sanitizer "compute-sanitizer cannot watch this device, see sanitizer.log"
    cp "$logs/probe.log" "$logs/sanitizer.log"
  else
    small=(-m pytest -q tests/maths/test_gpu.py -k "nan_and_extremes or 16_bits and bfloat16")
    for tool in memcheck racecheck; do
      part "sanitizer_$tool" 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        --kernel-regex kns=pylo_dist "$python" "${small[@]}"
    done
  fi
  wait "$suite"
fi
summary

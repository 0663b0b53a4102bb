#!/usr/bin/env bash
# Run every benchmark and draw the plots.
#
#   benchmarks/run_all.sh --quick                under 10 minutes on two CPU cores; small settings, marked "quick" in the JSON
#   benchmarks/run_all.sh                        all of it, hours on two cores
#
#   --out FOLDER    where the JSON goes; default: benchmarks/results, with --quick its subfolder quick, so that figures of long runs
#                   stay where they are
#   --plots FOLDER  where the plots go; default: docs, or --out where that is given
#   --pylo FOLDER   PyLO's source, --dion FOLDER: that of microsoft/dion; without them their rows say that they are absent
#   --weights FOLDER  of bench_quality.py: real meta-trained weights, which are not in the repository
#   --python FILE   default: .venv/bin/python
#   --patience N    multiplies the time limits, for a machine that is busy; default: 1
#
# Every step has a time limit. One that fails does not stop the others; it is named at the end, and the exit code is 1.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")

usage() {
  sed -n '2,17s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

quick=0 out="" plots="" patience=1 python="$root/.venv/bin/python"
folders=()
pylo=()
weights=()
while [ $# -gt 0 ]; do
  case "$1" in
    --quick)
      quick=1
      shift
      continue
      ;;
    --help | -h)
      usage
      exit 0
      ;;
  esac
  [ $# -ge 2 ] || {
    echo "$1: wanted one of --quick, --out, --plots, --pylo, --dion, --weights, --python, --patience, all but the first with a value; see --help" >&2
    exit 2
  }
  case "$1" in
    --out) out=$2 ;;
    --plots) plots=$2 ;;
    --pylo)
      pylo=(--pylo "$2")
      folders+=(--pylo "$2")
      ;;
    --dion) folders+=(--dion "$2") ;;
    --weights) weights=(--weights "$2") ;;
    --python) python=$2 ;;
    --patience)
      [[ $2 =~ ^[1-9][0-9]{0,3}$ ]] || {
        echo "--patience ${2@Q}: wanted a whole number" >&2
        exit 2
      }
      patience=$2
      ;;
    *)
      echo "$1: wanted one of --quick, --out, --plots, --pylo, --dion, --weights, --python, --patience; see --help" >&2
      exit 2
      ;;
  esac
  shift 2
done
if [ -n "$out" ]; then
  plots=${plots:-$out}
else
  out=$here/results
  [ "$quick" -eq 0 ] || out=$out/quick
  plots=${plots:-$root/docs}
fi
mkdir -p -- "$out"
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

export OMP_NUM_THREADS=1
# --python may name one that launch/setup.sh has not set up
export PYTHONPATH="$root:$root/launch:$here:$root/tests${PYTHONPATH:+:$PYTHONPATH}"
device=cpu
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then device=cuda; fi

failed=()
begin=$SECONDS
# run NAME SECONDS SCRIPT ARGUMENTS...: one benchmark within its time; of one that fails the end of its output
run() {
  local name=$1 limit=$2 script=$3 start=$SECONDS code=0
  shift 3
  timeout --kill-after=10 "$((limit * patience))" "$python" "$here/$script" "$@" >"$logs/$name" 2>&1 || code=$?
  if [ "$code" -ne 0 ]; then
    failed+=("$name (exit code $code)")
    tail -n 20 "$logs/$name" >&2
  fi
  echo "$name: $((SECONDS - start)) s, exit code $code" >&2
}

if [ "$quick" -eq 1 ]; then
  run seed_figures 180 seed_figures.py --quick --out "$out/seed_figures_$device.json" ${folders[@]+"${folders[@]}"}
  run train 180 bench_train.py --quick --out "$out/train.json"
  run scaling 120 scaling.py --quick --parts "$out/train.json" --out "$out/scaling.json"
  run memory 180 bench_memory.py --quick --out "$out/memory.json"
  run step 120 bench_step.py --device "$device" --quick --out "$out/step_$device.json" ${pylo[@]+"${pylo[@]}"}
  run zero 120 bench_zero.py --ranks 2 --rounds 2 --no-profiles --out "$out/zero.json"
  run demo_vs_adamw 120 bench_demo.py --seeds 0 --steps 20 --out "$out/demo_vs_adamw.json"
  run quality 120 bench_quality.py --quick --out "$out/quality.json"
  run state 240 bench_state.py --quick --out "$out/state.json"
  run faults 120 faults.py --trials 2 --out "$out/faults.json"
  run campaign 300 campaign.py --share 0.005 --out "$out/campaign.json"
  run checkpoint 120 bench_checkpoint.py --quick --out "$out/checkpoint.json"
  run any_to_any 180 any_to_any.py --quick --out "$out/any_to_any.json"
else
  run seed_figures 3600 seed_figures.py --out "$out/seed_figures_$device.json" ${folders[@]+"${folders[@]}"}
  run train 3600 bench_train.py --out "$out/train.json"
  run scaling 3600 scaling.py --parts "$out/train.json" --out "$out/scaling.json"
  run memory 3600 bench_memory.py --large --out "$out/memory.json"
  run step 3600 bench_step.py --device "$device" --out "$out/step_$device.json" ${pylo[@]+"${pylo[@]}"}
  run zero 3600 bench_zero.py --out "$out/zero.json"
  run demo_vs_adamw 7200 bench_demo.py --out "$out/demo_vs_adamw.json"
  run quality 43200 bench_quality.py ${weights[@]+"${weights[@]}"} --out "$out/quality.json"
  run state 14400 bench_state.py ${weights[@]+"${weights[@]}"} --quality "$out/quality.json" --out "$out/state.json"
  run faults 7200 faults.py --out "$out/faults.json"
  run campaign 7200 campaign.py --out "$out/campaign.json"
  run checkpoint 3600 bench_checkpoint.py --out "$out/checkpoint.json"
  run any_to_any 7200 any_to_any.py --out "$out/any_to_any.json"
fi
run plots 60 plots.py --results "$out" --out "$plots"

echo "all: $((SECONDS - begin)) s; JSON in $out, plots in $plots" >&2
if [ "${#failed[@]}" -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi

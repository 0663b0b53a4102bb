#!/usr/bin/env bash
# Run a command of launch/gpt2.py until it is done, and start it again after a crash or a preemption:
#
#   launch/resume_loop.sh torchrun --nproc_per_node=8 launch/gpt2.py --recipe launch/recipes/gpt2-124m.yaml --out runs/124m --save-every 500
#
#   FAILURES  give up after so many in a row without a new checkpoint; default: 5
#   REQUEUE   1: stopped by a signal under SLURM, the job goes back into the queue, unless SLURM itself is ending it: what scancel
#             ends stays ended, and what is preempted or requeued SLURM puts back by itself
#   PYTHON    reads the command's flags, as gpt2.py does; default: .venv's, or python3
#   WAIT      seconds before the first retry, doubled with each failure without a new checkpoint, at most 600; default: 5
#
# The command needs --out and --save-every, also from its recipe; --resume auto is added. A folder whose file DONE counts as many
# steps as the command wants, or its recipe, or else the default of --steps, is done: nothing is started.
# SIGTERM, SIGINT and SIGHUP, to this script or to the terminal's whole group, ask the run once to stop; the loop ends when the
# run has saved itself. A run that gets SIGTERM, from here or by itself, saves the step it is at: no step is lost, none is repeated.
# After kill -9 or a crash the steps since the last checkpoint are computed again, with the same samples.
#
# Exit code 0: done. 2: wrong input. 3: the loss is no number any more. 143: stopped by a signal. 1: given up. Since torchrun says 1
# for all of them, gpt2.py writes its own code into the file that EXIT_CODE_FILE names, beside the folder of --out.
set -uo pipefail

failures_allowed=${FAILURES:-5} wait_first=${WAIT:-5} wait_most=600
# The time that torchrun leaves its ranks to save, before SIGKILL; by itself 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}

say() { echo "resume_loop.sh: $*" >&2; }
# What comes from outside is computed with only if this says so: arithmetic would evaluate a name, and whatever stands in brackets.
is_number() { [[ $1 =~ ^[0-9]{1,15}$ ]]; }

for name in FAILURES WAIT; do
  if [ -n "${!name:-}" ] && ! [[ ${!name} =~ ^[0-9]{1,6}$ ]]; then
    say "$name is ${!name@Q}; a number of at most 6 digits was wanted"
    exit 2
  fi
done
failures_allowed=$((10#$failures_allowed)) wait_first=$((10#$wait_first))
launch=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")") python=${PYTHON:-}
for word in "$@"; do # sbatch runs a copy of this script: options.py lies beside the command's gpt2.py too
  if [ ! -e "$launch/options.py" ] && [ "${word##*/}" = gpt2.py ]; then launch=$(dirname -- "$word"); fi
done
if [ -z "$python" ]; then
  python=$launch/../.venv/bin/python
  [ -x "$python" ] || python=python3
fi
if [ ! -e "$launch/options.py" ]; then
  say "no options.py beside this script or the command's gpt2.py, to read the command by; start $0 from the repository"
  exit 2
fi
wanted=$("$python" "$launch/options.py" "$@") || {
  code=$?
  [ "$code" -eq 2 ] || say "$python could not read the command; name a Python that has what gpt2.py needs: PYTHON=..."
  exit 2
}
[ -n "$wanted" ] || exit 0 # --help, which has been given
steps=${wanted%%$'\n'*} out=${wanted#*$'\n'}
words=("$@")
if [ "${1##*/}" = srun ] && [ -z "${SLURM_JOB_ID:-}" ]; then
  say "srun is wanted in a job, whose steps can be asked to save; use launch/slurm/*.sbatch, or: salloc ... $0 $*"
  exit 2
fi
set -- "$@" --resume auto # of a repeated flag the last counts
export EXIT_CODE_FILE=${out%/}.exit-code

is_done() {
  local count
  [ -f "$out/DONE" ] && read -r count _ <"$out/DONE" && is_number "$count" && [ "$count" -ge "$steps" ]
}

newest() { # the step of the newest checkpoint, or 0
  local found=0 path
  for path in "$out"/checkpoints/step-*; do
    if [ -d "$path" ] && is_number "${path##*/step-}"; then found=${path##*/step-}; fi
  done
  echo "$((10#$found))"
}

job_runs() { # or else SLURM is ending the job, and has sent SIGTERM to all its processes by itself
  case $(scontrol show job "$SLURM_JOB_ID") in *JobState=RUNNING*) ;; *) return 1 ;; esac
}

child="" stopping="" asked="" pause=""
ask() { # the command to save and end; once, since torchrun would give up its ranks at the second time
  [ -z "$asked" ] || return
  asked=1
  case ${words[0]##*/} in
    # to the job's steps: srun itself answers SIGTERM by killing them. A job that is ending scancel would try again for minutes.
    srun) if job_runs; then scancel --signal=TERM "$SLURM_JOB_ID"; fi ;;
    # Open MPI kills its ranks a second after SIGTERM, and passes this one on
    mpirun | mpiexec) kill -USR1 "$child" 2>/dev/null ;;
    *) kill -TERM "$child" 2>/dev/null ;;
  esac
}
stop() {
  stopping=1
  if [ -n "$child" ]; then ask; fi
  if [ -n "$pause" ]; then kill "$pause" 2>/dev/null; fi
}
trap stop TERM INT HUP

stopped() {
  say "stopped by a signal; the newest checkpoint is of step $(newest)"
  if [ "${REQUEUE:-}" = 1 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    if job_runs; then scontrol requeue "$SLURM_JOB_ID"; else say "SLURM is ending job $SLURM_JOB_ID: not requeued from here"; fi
  fi
  exit 143
}

attempt=0 failures=0
while true; do
  if is_done; then
    say "$out is done"
    exit 0
  fi
  before=$(newest)
  attempt=$((attempt + 1))
  if [ -n "$stopping" ]; then stopped; fi
  say "attempt $attempt, from step $before"
  rm -f -- "$EXIT_CODE_FILE"
  setsid "$@" & # out of reach of Ctrl-C, which would end the ranks before they have saved
  child=$!
  if [ -n "$stopping" ]; then ask; fi # stopped between the two lines above
  while true; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break # a signal of our own ends `wait`, not the command
  done
  child=""
  if [ "$code" -ne 0 ] && [ -f "$EXIT_CODE_FILE" ]; then
    own=$(<"$EXIT_CODE_FILE")
    if is_number "$own"; then code=$own; fi
  fi
  rm -f -- "$EXIT_CODE_FILE"
  after=$(newest)
  if [ "$code" -eq 0 ] || is_done; then
    say "done after $attempt attempt(s)"
    exit 0
  fi
  if [ -n "$stopping" ]; then stopped; fi
  case $code in
    2) say "wrong input (exit code 2) is not tried again" && exit 2 ;;
    3) say "a loss that is no number (exit code 3) is not tried again: it would come again with the same samples" && exit 3 ;;
  esac
  if [ "$after" -gt "$before" ]; then
    failures=0
  else
    failures=$((failures + 1))
  fi
  if [ "$failures" -ge "$failures_allowed" ]; then
    say "given up: $failures failures in a row without a new checkpoint, the last with exit code $code; the newest is of step $after"
    exit 1
  fi
  seconds=$wait_first
  for ((i = 1; i < failures; i++)); do seconds=$((seconds * 2 > wait_most ? wait_most : seconds * 2)); done
  say "exit code $code at checkpoint $after, $failures of $failures_allowed failures without a new one; next attempt in $seconds s"
  sleep "$seconds" &
  pause=$!
  if [ -n "$stopping" ]; then kill "$pause" 2>/dev/null; fi
  wait "$pause" # returns at once when a signal comes
  pause=""
done

#!/usr/bin/env bash
# Run a command of launch/gpt2.py until it is done, and start it again after a crash or a preemption:
#
#   launch/resume_loop.sh torchrun --nproc_per_node=8 launch/gpt2.py --recipe launch/recipes/gpt2-124m.yaml --out runs/124m --save-every 500
#
#   FAILURES  give up after so many in a row without a new checkpoint; default: 5
#   REQUEUE   1: stopped by a signal under SLURM, the job goes back into the queue
#   WAIT      seconds before the first retry, doubled with each failure without a new checkpoint, at most 600; default: 5
#
# The command needs --out and --save-every; --resume auto is added. A folder with a file DONE is done: nothing is started.
# SIGTERM and SIGINT are passed on, then the loop ends when the run has saved itself. A run that gets SIGTERM, from here or by
# itself, saves the step it is at: no step is lost, none is repeated. After kill -9 or a crash the steps since the last checkpoint
# are computed again, with the same samples.
#
# Exit code 0: done. 2: wrong input. 143: stopped by a signal. 1: given up.
set -uo pipefail

failures_allowed=${FAILURES:-5} wait_first=${WAIT:-5} wait_most=600

say() { echo "resume_loop.sh: $*" >&2; }

out="" saves="" resumes="" previous=""
for word in "$@"; do
  case $word in
    --out=*) out=${word#--out=} ;;
    --save-every | --save-every=*) saves=1 ;;
    --resume | --resume=*) resumes=1 ;;
  esac
  if [ "$previous" = --out ]; then out=$word; fi
  previous=$word
done
if [ -z "$out" ]; then
  say "the command has no --out FOLDER; pass it, so that the next start finds the checkpoints"
  exit 2
fi
if [ -z "$saves" ]; then
  say "the command has no --save-every N; pass it, so that there is something to go on from"
  exit 2
fi
if [ -z "$resumes" ]; then set -- "$@" --resume auto; fi

newest() { # the step of the newest checkpoint, or 0
  local found=0 path
  for path in "$out"/checkpoints/step-*; do
    if [ -d "$path" ]; then found=${path##*/step-}; fi
  done
  echo "$((10#$found))"
}

child="" stopping=""
stop() {
  stopping=1
  if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi
}
trap stop TERM INT

stopped() {
  say "stopped by a signal; the newest checkpoint is of step $(newest)"
  if [ "${REQUEUE:-}" = 1 ] && [ -n "${SLURM_JOB_ID:-}" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
  exit 143
}

attempt=0 failures=0
while true; do
  if [ -e "$out/DONE" ]; then
    say "$out is done"
    exit 0
  fi
  before=$(newest)
  attempt=$((attempt + 1))
  if [ -n "$stopping" ]; then stopped; fi
  say "attempt $attempt, from step $before"
  "$@" &
  child=$!
  if [ -n "$stopping" ]; then kill -TERM "$child" 2>/dev/null; fi # asked between the two lines above
  while true; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break # a signal of our own ends `wait`, not the command
  done
  child=""
  after=$(newest)
  if [ "$code" -eq 0 ] || [ -e "$out/DONE" ]; then
    say "done after $attempt attempt(s)"
    exit 0
  fi
  if [ -n "$stopping" ]; then stopped; fi
  if [ "$code" -eq 2 ]; then
    say "wrong input (exit code 2) is not tried again"
    exit 2
  fi
  if [ "$after" -gt "$before" ]; then
    failures=0
  else
    failures=$((failures + 1))
  fi
  if [ "$failures" -ge "$failures_allowed" ]; then
    say "given up: $failures failures in a row without a new checkpoint, the last with exit code $code; the newest is of step $after"
    exit 1
  fi
  pause=$wait_first
  for ((i = 1; i < failures; i++)); do pause=$((pause * 2 > wait_most ? wait_most : pause * 2)); done
  say "exit code $code at checkpoint $after, $failures of $failures_allowed failures without a new one; next attempt in $pause s"
  sleep "$pause" &
  child=$! # so that a signal ends it, whenever it comes
  if [ -n "$stopping" ]; then kill -TERM "$child" 2>/dev/null; fi
  wait "$child"
  child=""
done

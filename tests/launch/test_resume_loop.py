"""launch/resume_loop.sh: no step is lost and none repeated by an interruption, and it knows when to stop."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import gpt2
from checkpoints import published_in

from .test_environment import ROOT, wait_for, wait_for_rows

sys.path.insert(0, str(ROOT / "benchmarks"))

from faults import differences, rows_of

STEPS = 300
# A command that keeps what the run has written before the next start of it goes on from there.
KEEPER = """#!/usr/bin/env bash
echo $$ >"$KEPT/pid"
cp "$OUT/metrics.jsonl" "$KEPT/$(find "$KEPT" -name '*.jsonl' | wc -l).jsonl" 2>/dev/null
exec "$@"
"""
# One that stands for a run: makes checkpoints "$@" steps on, one per call, and ends with the code that follows it.
STUB = """#!/usr/bin/env bash
mapfile -t plan <"$PLAN"
read -r step code <<<"${plan[0]}"
printf '%s\\n' "${plan[@]:1}" >"$PLAN"
[ "$step" = - ] || mkdir -p "$OUT/checkpoints/step-$(printf %08d "$step")"
echo "$*" >>"$CALLS"
exit "$code"
"""


def loop(command: list[str], **variables: str) -> subprocess.Popen[str]:
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WAIT": "0"}
    command = [str(ROOT / "launch" / "resume_loop.sh"), *command]
    return subprocess.Popen(command, env=os.environ | shared | variables, stderr=subprocess.PIPE, text=True)


def test_three_interruptions_lose_no_step_and_repeat_none(tmp_path: Path) -> None:
    """By SIGTERM. What kill -9 leaves behind, test_resume.py has: the steps since the last checkpoint are done a second time."""
    out, whole, kept, script = tmp_path / "run", tmp_path / "whole", tmp_path / "kept", tmp_path / "keeper.sh"
    kept.mkdir()
    script.write_text(KEEPER)
    script.chmod(0o755)
    words = ["--preset", "nano", "--block-size", "16", "--batch-size", "4", "--eval-every", "50", "--eval-batches", "1"]
    words += ["--optimizer", "adafaclo", "--weights", "demo", "--device", "cpu", "--threads", "1"]
    words += ["--steps", str(STEPS), "--save-every", "100", "--schedule", "cosine", "--out"]
    command = [str(script), sys.executable, str(ROOT / "launch" / "gpt2.py"), *words, str(out)]
    variables = {"OUT": str(out), "KEPT": str(kept)}

    def rows_at_end_of(attempt: int) -> list[int]:
        return [json.loads(line)["step"] for line in (kept / f"{attempt}.jsonl").read_text().splitlines()]

    first = loop(command, **variables)  # gets it itself, as from a scheduler, then is started again
    wait_for_rows(out, 20)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=120)[1]
    assert first.returncode == 128 + signal.SIGTERM, said
    second = loop(command, **variables)
    try:
        for attempt, count in enumerate((50, 90), 1):  # the run alone gets it, and the loop starts it again
            wait_for((kept / f"{attempt - 1}.jsonl").exists)  # it has been started again
            wait_for_rows(out, count)
            os.kill(int((kept / "pid").read_text()), signal.SIGTERM)
            wait_for((kept / f"{attempt}.jsonl").exists)
        said += second.communicate(timeout=120)[1]
    finally:
        second.kill()
    assert second.returncode == 0, said
    assert (out / "DONE").exists()
    assert re.findall(r"attempt (\d)", said) == ["1", "1", "2", "3"], said

    # what each attempt had done when it ended, and where the next one went on
    resumed = [int(step) for step in re.findall(r"goes on after step (\d+)", said)]
    ended = [rows_at_end_of(attempt) for attempt in range(3)]
    assert [steps[-1] for steps in ended] == resumed  # every step done is saved: none is lost, and none is done again
    assert all(steps == list(range(1, len(steps) + 1)) for steps in ended)

    assert gpt2.main([*words, str(whole)]) == 0
    assert [row["step"] for row in rows_of(out)] == list(range(1, STEPS + 1))
    for step in set(published_in(out)) - set(published_in(whole)):
        (out / "checkpoints" / f"step-{step:08d}").rename(tmp_path / f"{step}")
    assert differences(whole, out, STEPS) == []  # parameters, state and losses, bit for bit
    assert loop(command, **variables).communicate(timeout=60)[1] == f"resume_loop.sh: {out} is done\n"


def test_when_the_loop_stops(tmp_path: Path) -> None:
    stub = tmp_path / "stub.sh"
    stub.write_text(STUB)
    stub.chmod(0o755)
    for name, plan, code, calls, words in (
        ("done", ["1 1", "2 139", "- 0"], 0, 3, "done after 3 attempt(s)"),
        ("given up", ["- 1"] * 9, 1, 3, "given up: 3 failures in a row without a new checkpoint, the last with exit code 1"),
        ("progress", ["- 1", "- 1", "8 1", "- 1", "- 1", "9 7", *["- 7"] * 3], 1, 9, "exit code 7; the newest is of step 9"),
        ("wrong input", ["- 1", "- 2", "- 0"], 2, 2, "wrong input (exit code 2) is not tried again"),
    ):
        out = tmp_path / name
        out.mkdir()
        variables = {"PLAN": str(out / "plan"), "CALLS": str(out / "calls"), "OUT": str(out), "FAILURES": "3"}
        (out / "plan").write_text("\n".join(plan))
        process = loop([str(stub), f"--out={out}", "--save-every", "5"], **variables)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code, (name, said)
        assert words in said, (name, said)
        assert (out / "calls").read_text().splitlines() == [f"--out={out} --save-every 5 --resume auto"] * calls, name
    (out / "plan").write_text("- 1")
    waits = loop([str(stub), "--out", str(out), "--save-every", "5"], **{**variables, "FAILURES": "9", "WAIT": "100"})
    assert waits.stderr is not None
    while "next attempt in 100 s" not in (said := waits.stderr.readline()):
        assert said, "the loop has ended"
    waits.send_signal(signal.SIGTERM)
    assert waits.wait(timeout=60) == 128 + signal.SIGTERM
    for arguments, words in ((["x", "--save-every", "5"], "no --out FOLDER"), (["x", "--out", "y"], "no --save-every N")):
        process = loop(arguments)
        assert words in process.communicate(timeout=60)[1]
        assert process.returncode == 2

"""launch/resume_loop.sh: no step is lost and none repeated by an interruption, and it knows when to stop."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import gpt2
from checkpoints import published_in

from .test_environment import ROOT, mpirun, wait_for, wait_for_rows

sys.path.insert(0, str(ROOT / "benchmarks"))

from faults import differences, rows_of

STEPS = 300
# A command that keeps what the run has written before the next start of it goes on from there.
KEEPER = """#!/usr/bin/env bash
echo $$ >"$KEPT/pid"
cp "$OUT/metrics.jsonl" "$KEPT/$(find "$KEPT" -name '*.jsonl' | wc -l).jsonl" 2>/dev/null
exec "$@"
"""
# One that stands for a run, with a line of a plan for each call: the step of a checkpoint, the code to end with, and that which
# gpt2.py hands over, where torchrun ends with another.
STUB = """#!/usr/bin/env bash
mapfile -t plan <"$PLAN"
read -r step code own <<<"${plan[0]}"
[ -z "$own" ] || echo "$own" >"$EXIT_CODE_FILE"
printf '%s\\n' "${plan[@]:1}" >"$PLAN"
[ "$step" = - ] || mkdir -p "$OUT/checkpoints/step-$(printf %08d "$step")"
echo "$*" >>"$CALLS"
exit "$code"
"""
# A rank that takes two seconds to save.
SLOW = """#!/usr/bin/env bash
trap 'sleep 2; echo saved >>"$OUT"; exit 143' USR1
echo began >"$OUT"
while :; do sleep 0.1; done
"""


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def loop(command: list[str], stderr: int | IO[str] = subprocess.PIPE, **variables: str) -> subprocess.Popen[str]:
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WAIT": "0"}
    command = [str(ROOT / "launch" / "resume_loop.sh"), *command]
    return subprocess.Popen(command, env=os.environ | shared | variables, stderr=stderr, text=True)


def test_three_interruptions_lose_no_step_and_repeat_none(tmp_path: Path) -> None:
    """By SIGTERM. What kill -9 leaves behind, test_resume.py has: the steps since the last checkpoint are done a second time."""
    out, whole, kept = tmp_path / "run", tmp_path / "whole", tmp_path / "kept"
    kept.mkdir()
    words = ["--preset", "nano", "--block-size", "16", "--batch-size", "4", "--eval-every", "50", "--eval-batches", "1"]
    words += ["--optimizer", "adafaclo", "--weights", "demo", "--device", "cpu", "--threads", "1"]
    words += ["--steps", str(STEPS), "--save-every", "100", "--schedule", "cosine", "--out"]
    command = [script(tmp_path / "keeper.sh", KEEPER), sys.executable, str(ROOT / "launch" / "gpt2.py"), *words, str(out)]
    variables = {"OUT": str(out), "KEPT": str(kept)}

    def rows_at_end_of(attempt: int) -> list[int]:
        return [json.loads(line)["step"] for line in (kept / f"{attempt}.jsonl").read_text().splitlines()]

    first = loop(command, **variables)  # gets it itself, as from a scheduler, then is started again
    wait_for_rows(out, 20)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=120)[1]
    assert first.returncode == 128 + signal.SIGTERM, said
    with (tmp_path / "said").open("w") as stderr:
        second = loop(command, stderr, **variables)

    def resumed() -> list[int]:  # where each attempt has gone on
        return [int(step) for step in re.findall(r"goes on after step (\d+)", (tmp_path / "said").read_text())]

    try:
        for attempt, number in ((1, signal.SIGTERM), (2, signal.SIGUSR1)):  # the run alone gets it, and the loop starts it again
            wait_for(lambda attempt=attempt: len(resumed()) == attempt)
            wait_for_rows(out, resumed()[-1] + 20)
            os.kill(int((kept / "pid").read_text()), number)
        second.wait(timeout=120)
    finally:
        second.kill()
    said += (tmp_path / "said").read_text()
    assert second.returncode == 0, said
    assert (out / "DONE").exists()
    assert re.findall(r"attempt (\d)", said) == ["1", "1", "2", "3"], said

    # what each attempt had done when it ended, and where the next one went on
    ended = [rows_at_end_of(attempt) for attempt in range(3)]
    assert [steps[-1] for steps in ended] == resumed()  # every step done is saved: none is lost, and none is done again
    assert all(steps == list(range(1, len(steps) + 1)) for steps in ended)

    assert gpt2.main([*words, str(whole)]) == 0
    assert [row["step"] for row in rows_of(out)] == list(range(1, STEPS + 1))
    for step in set(published_in(out)) - set(published_in(whole)):
        (out / "checkpoints" / f"step-{step:08d}").rename(tmp_path / f"{step}")
    assert differences(whole, out, STEPS) == []  # parameters, state and losses, bit for bit
    assert loop(command, **variables).communicate(timeout=60)[1] == f"resume_loop.sh: {out} is done\n"


def test_when_the_loop_stops(tmp_path: Path) -> None:
    stub = script(tmp_path / "stub.sh", STUB)
    for name, plan, code, calls, words in (
        ("done", ["1 1", "2 139", "- 0"], 0, 3, "done after 3 attempt(s)"),
        ("given up", ["- 1"] * 9, 1, 3, "given up: 3 failures in a row without a new checkpoint, the last with exit code 1"),
        ("progress", ["- 1", "- 1", "8 1", "- 1", "- 1", "9 7", *["- 7"] * 3], 1, 9, "exit code 7; the newest is of step 9"),
        ("wrong input", ["- 1", "- 2", "- 0"], 2, 2, "wrong input (exit code 2) is not tried again"),
        ("behind torchrun", ["- 1 143", "- 1 2", "- 0"], 2, 2, "exit code 143 at checkpoint 0, 1 of 3"),
        ("diverged", ["7 1", "- 1 3", "- 0"], 3, 2, "no number (exit code 3) is not tried again"),
    ):
        out = tmp_path / name
        out.mkdir()
        variables = {"PLAN": str(out / "plan"), "CALLS": str(out / "calls"), "OUT": str(out), "FAILURES": "3"}
        (out / "plan").write_text("\n".join(plan))
        process = loop([stub, f"--out={out}", "--save-every", "5"], **variables)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code, (name, said)
        assert words in said, (name, said)
        assert (out / "calls").read_text().splitlines() == [f"--out={out} --save-every 5 --resume auto"] * calls, name
        assert not Path(f"{out}.exit-code").exists()
    (out / "plan").write_text("- 1")
    waits = loop([stub, "--out", str(out), "--save-every", "5"], **{**variables, "FAILURES": "9", "WAIT": "100"})
    assert waits.stderr is not None
    while "next attempt in 100 s" not in (said := waits.stderr.readline()):
        assert said, "the loop has ended"
    waits.send_signal(signal.SIGTERM)
    waits.communicate(timeout=10)  # to the end of stderr, which the pause would hold open
    assert waits.returncode == 128 + signal.SIGTERM


def test_what_the_command_must_say(tmp_path: Path) -> None:
    """Or its recipe. And a longer run than that which is done goes on."""
    out, recipe = tmp_path / "out", tmp_path / "mine.yaml"
    recipe.write_text("about: x\ncost: y\nflags:\n  save_every: 50  # or so\n  steps: '300'\n")
    out.mkdir()
    (out / "DONE").write_text("300 steps\n")
    saves, done, starts = ["--save-every", "5"], f"resume_loop.sh: {out} is done\n", "attempt 1, from step 0"
    for arguments, code, words in (
        (["x", *saves], 2, "no --out FOLDER"),
        (["x", f"--out={out}"], 2, "no --save-every N"),
        (["x", f"--out={out}", *saves, "--resume", "runs/y"], 2, "--resume runs/y would be repeated"),
        (["x", f"--out={out}", *saves], 0, done),
        (["x", f"--out={out}", "--recipe", str(recipe), "--resume=auto"], 0, done),
        (["x", f"--out={out}", f"--recipe={recipe}", "--steps=200"], 0, done),
        (["true", f"--out={out}", f"--recipe={recipe}", "--steps", "600"], 0, starts),
        (["true", f"--out={out}", *saves, "--steps", "300", "--steps", "301"], 0, starts),
    ):
        process = loop(arguments)
        assert words in process.communicate(timeout=60)[1], arguments
        assert process.returncode == code, arguments


def test_wrong_input_behind_torchrun_is_not_tried_again(tmp_path: Path) -> None:
    """torchrun ends with 1 whatever its ranks end with."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    out = tmp_path / "new" / "out"
    process = loop([*torchrun, str(ROOT / "launch" / "gpt2.py"), "--out", str(out), "--save-every", "0", "--keep", "1"])
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2, said
    assert "gpt2.py: --keep 1 came without --save-every" in said
    assert "attempt 2" not in said


def test_mpirun_leaves_its_ranks_the_time_to_save(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    command = [*mpirun(1), script(tmp_path / "slow.sh", SLOW), "--out", str(tmp_path / "out"), "--save-every", "5"]
    process = loop(command, OUT=str(saved))
    try:
        wait_for(saved.exists)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert saved.read_text() == "began\nsaved\n"

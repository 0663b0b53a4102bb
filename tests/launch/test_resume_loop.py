"""launch/resume_loop.sh: no step is lost and none repeated by an interruption, and it knows when to
stop.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import gpt2
import pytest
from checkpoints import published_in
from faults import differences, rows_of
from options import WrongInput, parse, repeatable

from support.launchers import mpirun, wait_for, wait_for_rows

ROOT = Path(__file__).resolve().parents[2]
LOOP = ROOT / "launch" / "resume_loop.sh"
STEPS = 300
# A command that keeps what the run has written before the next start of it goes on from there.
KEEPER = """#!/usr/bin/env bash
echo $$ >"$KEPT/pid"
cp "$OUT/metrics.jsonl" "$KEPT/$(find "$KEPT" -name '*.jsonl' | wc -l).jsonl" 2>/dev/null
exec "$@"
"""
# One that stands for a run, with a line of a plan for each call: the step of a checkpoint, the code
# to end with, and that which gpt2.py hands over, where torchrun ends with another.
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


def loop(
    command: list[str],
    stderr: int | IO[str] = subprocess.PIPE,
    start: Path = LOOP,
    **variables: str,
) -> subprocess.Popen[str]:
    shared = {
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "WAIT": "0",
    }
    return subprocess.Popen(
        [str(start), *command], env=os.environ | shared | variables, stderr=stderr, text=True
    )


def test_three_interruptions_lose_no_step_and_repeat_none(tmp_path: Path) -> None:
    """By SIGTERM. What kill -9 leaves behind, test_resume.py has: the steps since the last
    checkpoint are done a second time.
    """
    out, whole, kept = tmp_path / "run", tmp_path / "whole", tmp_path / "kept"
    kept.mkdir()
    words = [
        "--preset",
        "nano",
        "--block-size",
        "16",
        "--batch-size",
        "4",
        "--eval-every",
        "50",
        "--eval-batches",
        "1",
    ]
    words += ["--optimizer", "adafaclo", "--weights", "demo", "--device", "cpu", "--threads", "1"]
    words += ["--steps", str(STEPS), "--save-every", "100", "--schedule", "cosine", "--out"]
    command = [
        script(tmp_path / "keeper.sh", KEEPER),
        sys.executable,
        str(ROOT / "launch" / "gpt2.py"),
        *words,
        str(out),
    ]
    variables = {"OUT": str(out), "KEPT": str(kept)}

    def rows_at_end_of(attempt: int) -> list[int]:
        return [
            json.loads(line)["step"]
            for line in (kept / f"{attempt}.jsonl").read_text().splitlines()
        ]

    first = loop(command, **variables)  # gets it itself, as from a scheduler, then is started again
    wait_for_rows(out, 20)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=120)[1]
    assert first.returncode == 128 + signal.SIGTERM, said
    with (tmp_path / "said").open("w") as stderr:
        second = loop(command, stderr, **variables)

    def resumed() -> list[int]:  # where each attempt has gone on
        return [
            int(step)
            for step in re.findall(r"goes on after step (\d+)", (tmp_path / "said").read_text())
        ]

    try:
        # the run alone gets it, and the loop starts it again
        for attempt, number in ((1, signal.SIGTERM), (2, signal.SIGUSR1)):
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
    # every step done is saved: none is lost, and none is done again
    assert [steps[-1] for steps in ended] == resumed()
    assert all(steps == list(range(1, len(steps) + 1)) for steps in ended)

    assert gpt2.main([*words, str(whole)]) == 0
    assert [row["step"] for row in rows_of(out)] == list(range(1, STEPS + 1))
    for step in set(published_in(out)) - set(published_in(whole)):
        (out / "checkpoints" / f"step-{step:08d}").rename(tmp_path / f"{step}")
    assert differences(whole, out, STEPS) == []  # parameters, state and losses, bit for bit
    assert (
        loop(command, **variables).communicate(timeout=60)[1] == f"resume_loop.sh: {out} is done\n"
    )


def test_when_the_loop_stops(tmp_path: Path) -> None:
    stub = script(tmp_path / "gpt2.py", STUB)
    for name, plan, code, calls, words in (
        ("done", ["1 1", "2 139", "- 0"], 0, 3, "done after 3 attempt(s)"),
        (
            "given up",
            ["- 1"] * 9,
            1,
            3,
            "given up: 3 failures in a row without a new checkpoint, the last with exit code 1",
        ),
        (
            "progress",
            ["- 1", "- 1", "8 1", "- 1", "- 1", "9 7", *["- 7"] * 3],
            1,
            9,
            "exit code 7; the newest is of step 9",
        ),
        (
            "wrong input",
            ["- 1", "- 2", "- 0"],
            2,
            2,
            "wrong input (exit code 2) is not tried again",
        ),
        (
            "behind torchrun",
            ["- 1 143", "- 1 2", "- 0"],
            2,
            2,
            "exit code 143 at checkpoint 0, 1 of 3",
        ),
        ("diverged", ["7 1", "- 1 3", "- 0"], 3, 2, "no number (exit code 3) is not tried again"),
    ):
        out = tmp_path / name
        out.mkdir()
        variables = {
            "PLAN": str(out / "plan"),
            "CALLS": str(out / "calls"),
            "OUT": str(out),
            "FAILURES": "3",
        }
        (out / "plan").write_text("\n".join(plan))
        process = loop([stub, f"--out={out}", "--save-every", "5"], **variables)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code, (name, said)
        assert words in said, (name, said)
        assert (out / "calls").read_text().splitlines() == [
            f"--out={out} --save-every 5 --resume auto"
        ] * calls, name
        assert not Path(f"{out}.exit-code").exists()
    (out / "plan").write_text("- 1")
    waits = loop(
        [stub, "--out", str(out), "--save-every", "5"],
        **{**variables, "FAILURES": "9", "WAIT": "100"},
    )
    assert waits.stderr is not None
    while "next attempt in 100 s" not in (said := waits.stderr.readline()):
        assert said, "the loop has ended"
    waits.send_signal(signal.SIGTERM)
    waits.communicate(timeout=10)  # to the end of stderr, which the pause would hold open
    assert waits.returncode == 128 + signal.SIGTERM


def test_nothing_from_outside_is_computed_with(tmp_path: Path) -> None:
    """Names of folders, and what stands in files and variables: `Y` is 7 to arithmetic."""
    stub = script(tmp_path / "gpt2.py", STUB)
    out = tmp_path / "out"
    for name in ("step-Y", "step-1+1", "step-00000003", "step-Y[0]"):
        (out / "checkpoints" / name).mkdir(parents=True)
    (out / "DONE").write_text("Y steps")
    (out / "plan").write_text("- 1 Y\n4 0\n")
    variables = {"PLAN": str(out / "plan"), "CALLS": str(out / "calls"), "OUT": str(out), "Y": "7"}
    command = [stub, f"--out={out}", "--save-every=5", "--steps=5"]
    for odd in ({"WAIT": "Y"}, {"FAILURES": "-1"}, {"FAILURES": "1+1"}):
        process = loop(command, **{**variables, **odd})
        _, said = process.communicate(timeout=60)
        ((name, value),) = odd.items()
        assert process.returncode == 2, said
        assert f"{name} is '{value}'; a number of at most 6 digits was wanted" in said
    process = loop(command, **variables, FAILURES="08")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "attempt 1, from step 3" in said
    assert "exit code 1 at checkpoint 3, 1 of 8 failures" in said
    assert "attempt 2, from step 3" in said


def test_what_the_command_must_say(tmp_path: Path) -> None:
    """Or its recipe, which is read as gpt2.py reads it: flags win, of a repeated one the last, and
    `none` takes one back.
    """
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "about: 'steps: 5'\ncost: y\nflags: {save_every: 50, steps: '400', out: 'run #1'}  # any "
        "form of YAML\n"
    )
    flags = [f"--recipe={recipe}"]
    launcher = ["torchrun", "--nproc_per_node=8", "x/gpt2.py"]
    for words, steps, out in (
        (flags, 400, "run #1"),
        ([*flags, "--steps=200", "--out", "a", "--resume=auto"], 200, "a"),
        (["--steps", "7", *flags, "--steps", "601"], 601, "run #1"),
        # nobody says how many: as many as gpt2.py would take
        (["--out=a/", "--save-every=5"], parse([]).steps, "a"),
    ):
        found = repeatable([*launcher, *words])
        assert (found.steps, str(found.out)) == (steps, out)
    for command, said in (
        (["true", "--out=a", "--save-every=5"], "names no gpt2.py"),
        ([*launcher, "--save-every", "5"], "no --out FOLDER"),
        ([*launcher, *flags, "--out", "none"], "no --out FOLDER"),
        ([*launcher, "--out=a"], "no --save-every N"),
        ([*launcher, *flags, "--save-every=0"], "no --save-every N"),
        ([*launcher, *flags, "--resume", "runs/y"], "--resume runs/y would be repeated"),
        ([*launcher, *flags, "--stepz=3"], "--stepz"),
        ([*launcher, "--recipe", "gone.yaml"], "gone.yaml cannot be read"),
    ):
        with pytest.raises(WrongInput, match=said):
            repeatable(command)


def test_a_done_folder_is_left_alone(tmp_path: Path) -> None:
    """And goes on where the command wants more steps than it has, or than the default where nobody
    says how many.
    """
    out, calls, default = tmp_path / "out", tmp_path / "calls", parse([]).steps
    out.mkdir()
    stub = script(tmp_path / "gpt2.py", STUB)
    variables = {"PLAN": str(tmp_path / "plan"), "CALLS": str(calls), "OUT": str(out)}
    for steps, words, starts in (
        (300, ["--steps", "300"], 0),
        (300, ["--steps", "301"], 1),
        (default, [], 0),
        (default - 1, [], 1),
    ):
        (out / "DONE").write_text(f"{steps} steps\n")
        (tmp_path / "plan").write_text("- 0\n")
        calls.unlink(missing_ok=True)
        process = loop([stub, f"--out={out}", "--save-every=5", *words], **variables)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 0, said
        assert (f"{out} is done" in said) == (starts == 0), said
        assert calls.exists() == (starts == 1)
    for python, said in (
        (sys.executable, "no --out FOLDER"),
        ("false", "false could not read the command; .* PYTHON="),
    ):
        process = loop([stub, "--save-every=5"], PYTHON=python)
        assert re.search(said, process.communicate(timeout=60)[1])
        assert process.returncode == 2


def test_the_loop_may_be_started_from_elsewhere(tmp_path: Path) -> None:
    """By a link to it, or as a copy beside nothing, which is what `sbatch launch/resume_loop.sh
    ...` runs.
    """
    link, copy, calls, alone = (
        tmp_path / "a link",
        tmp_path / "slurm_script",
        tmp_path / "calls",
        tmp_path / "no launch",
    )
    link.symlink_to(LOOP)
    shutil.copy(link, copy)
    alone.mkdir()
    stub = script(alone / "gpt2.py", STUB)
    launch = tmp_path / "launch"
    launch.mkdir()
    for path in (ROOT / "launch").glob("*.py"):
        (launch / path.name).symlink_to(path)
    (launch / "gpt2.py").unlink()
    flags = ["--out", str(tmp_path / "out"), "--save-every", "5"]
    variables = {"PLAN": str(tmp_path / "plan"), "CALLS": str(calls), "OUT": str(tmp_path / "out")}
    for start, command, code, words, starts in (
        (link, [stub, *flags], 0, "done after 1 attempt", 1),
        (copy, [script(launch / "gpt2.py", STUB), *flags], 0, "done after 1 attempt", 1),
        (copy, [stub, *flags], 2, "no options.py beside", 0),
        (link, [stub, *flags, "--help"], 0, "--save-every SAVE_EVERY", 0),
    ):
        (tmp_path / "plan").write_text("- 0\n")
        calls.unlink(missing_ok=True)
        process = loop(command, start=start, **variables)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == code, said
        assert words in said
        assert calls.exists() == (starts == 1), said


def test_wrong_input_behind_torchrun_is_not_tried_again(tmp_path: Path) -> None:
    """torchrun ends with 1 whatever its ranks end with."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    out = tmp_path / "new" / "out"
    process = loop(
        [
            *torchrun,
            str(ROOT / "launch" / "gpt2.py"),
            "--out",
            str(out),
            "--save-every",
            "5",
            "--data",
            str(out / "none"),
        ]
    )
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2, said
    assert f"gpt2.py: {out / 'none'}: no such file" in said
    assert "attempt 2" not in said


SRUN = """#!/usr/bin/env bash
trap 'exit 143' TERM
echo $$ >"$OUT"
while :; do sleep 0.1; done
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
[ "$1" = requeue ] || echo "JobId=$3 JobName=gpt2 JobState=$STATE Reason=None"
"""
SCANCEL = """#!/usr/bin/env bash
echo "scancel $*" >>"$CALLS"
kill $(cat "$OUT")
"""


def test_a_job_that_slurm_ends_is_left_to_it(tmp_path: Path) -> None:
    """A warning before the time limit finds the job running, and SLURM has told the batch script
    alone.

    After scancel, preemption or `scontrol requeue` it is completing and all its processes have got
    SIGTERM. A `scontrol requeue` now would bring back what the user has cancelled, and a `scancel
    --signal` would try again until SLURM kills the script.
    """
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        script(tmp_path / name, text)
    command = [
        str(tmp_path / "srun"),
        "gpt2.py",
        "--out",
        str(tmp_path / "out"),
        "--save-every",
        "5",
    ]
    slurm = {
        "SLURM_JOB_ID": "12",
        "REQUEUE": "1",
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    }
    show = "show job 12"
    for state, wanted in (
        ("RUNNING", [show, "scancel --signal=TERM 12", show, "requeue 12"]),
        ("COMPLETING", [show, show]),
    ):
        began, calls = tmp_path / f"began-{state}", tmp_path / f"calls-{state}"
        process = loop(command, OUT=str(began), CALLS=str(calls), STATE=state, **slurm)
        try:
            wait_for(lambda began=began: began.exists() and began.read_text().endswith("\n"))
            process.send_signal(signal.SIGTERM)
            if state == "COMPLETING":
                wait_for(calls.exists)
                os.kill(int(began.read_text()), signal.SIGTERM)
            said = process.communicate(timeout=60)[1]
        finally:
            process.kill()
        assert process.returncode == 128 + signal.SIGTERM, said
        assert calls.read_text().splitlines() == wanted
        assert ("SLURM is ending job 12" in said) == (state == "COMPLETING"), said
    process = loop(command, SLURM_JOB_ID="")
    assert "srun is wanted in a job" in process.communicate(timeout=60)[1]
    assert process.returncode == 2


def test_mpirun_leaves_its_ranks_the_time_to_save(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    command = [
        *mpirun(1),
        script(tmp_path / "gpt2.py", SLOW),
        "--out",
        str(tmp_path / "out"),
        "--save-every",
        "5",
    ]
    process = loop(command, OUT=str(saved))
    try:
        wait_for(saved.exists)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert saved.read_text() == "began\nsaved\n"

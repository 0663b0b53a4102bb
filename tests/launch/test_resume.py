"""A run that was stopped, killed or moved to other ranks goes on as if nothing had happened, or
says why it does not.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faults
import gpt2
import pytest
import torch
from checkpoints import Keeper, published_in, remove
from claim import Claim
from data import Tokens
from faults import OPTIMIZERS, Faults, Kill, Setup, codes_of, differences, rows_of, run, started
from watch import Row, Watch, rows_until

from pylo_dist.checkpoint.folder import _machine

ROOT = Path(__file__).resolve().parents[2]
STOPPED = 128 + signal.SIGTERM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the runs of this module, with tokens in it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    path = tmp_path_factory.mktemp("resume")
    faults.prepare(path)
    return path


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """A run of AdafacLO on one rank, 8 steps, all its checkpoints kept: 3, 6 and 8. Tests copy
    it.
    """
    out = folder / "finished"
    assert gpt2.main(command(folder, out)) == 0
    return out


def command(folder: Path, out: Path, *extra: str, optimizer: str = "adafaclo") -> list[str]:
    """The command of faults.py on one rank, without --resume and --keep."""
    words = Setup(folder, "adamw", 1, steps=8).command(out)
    at = words.index("--optimizer")
    words[at : at + 2] = OPTIMIZERS.get(optimizer, ["--optimizer", optimizer])
    for name in ("--resume", "--keep"):
        at = words.index(name)
        del words[at : at + 2]
    return [*words, *extra]


def copy_of(run_folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(run_folder, to))


def tree(path: Path) -> dict[str, str]:
    """Hashes of all files below a folder."""
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in path.rglob("*")
        if p.is_file()
    }


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process sent SIGTERM as soon as the row of a step is written."""
    add = Watch.add

    def add_and_stop(self: Watch, row: Row) -> None:
        add(self, row)
        if row.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Watch, "add", add_and_stop)


@pytest.mark.parametrize("optimizer", ["adafaclo", "adamw", "velo"])
def test_sigterm_saves_and_the_run_goes_on_bit_equal(
    optimizer: str,
    folder: Path,
    finished: Path,
    learned_weights: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, out = finished, tmp_path / "stopped"
    extra: list[str] = []
    if optimizer != "adafaclo":
        whole, extra = tmp_path / "whole", ["--max-grad-norm", "1", "--warmup", "6"]
        if optimizer == "velo":  # with state that belongs to all tensors, and a planned length
            extra += ["--weights", str(learned_weights["velo"])]
        assert gpt2.main(command(folder, whole, *extra, optimizer=optimizer)) == 0
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        assert gpt2.main(command(folder, out, *extra, optimizer=optimizer)) == STOPPED
    assert signal.getsignal(signal.SIGTERM) == before
    said = capsys.readouterr().err.splitlines()[-1]
    assert "SIGTERM: stopped after step 5, saved in" in said
    assert list(published_in(out)) == [3, 5]
    assert gpt2.main(command(folder, out, *extra, "--resume", "auto", optimizer=optimizer)) == 0
    assert f"goes on after step 5 from {out}" in capsys.readouterr().err
    assert list(published_in(out)) == [3, 5, 6, 8]
    remove(published_in(out)[5])  # which the other run has not
    assert [row["step"] for row in rows_of(out)] == list(range(1, 9))
    assert differences(whole, out, 8) == []
    config = json.loads((out / "config.json").read_text())
    assert config["resumed_from"] == {
        "checkpoint": str(out / "checkpoints" / "step-00000005"),
        "step": 5,
    }
    assert config["threads"] == 1


def test_the_comparison_sees_one_bit(folder: Path, finished: Path, tmp_path: Path) -> None:
    """Of the test above and of faults.py: runs that differ in one sample, and in the last bit of
    one number.
    """
    out = tmp_path / "other"
    assert gpt2.main(command(folder, out, "--seed", "1")) == 0
    found = differences(finished, out, 8)
    assert {"metrics.jsonl", "/model/norm.weight"} <= set(found)
    wanted = faults.content(published_in(finished)[8])
    assert sum(isinstance(value, torch.Tensor) for value in wanted.values()) > 100
    assert differences(finished, finished, 8) == []


def test_another_number_of_ranks_follows_the_curve(
    folder: Path, finished: Path, capfd: pytest.CaptureFixture[str], figures: list[str]
) -> None:
    """From two ranks, of which one alone gets SIGTERM while they save step 3, to one; and from one
    to two.
    """
    fewer, more = folder / "fewer", copy_of(finished, folder / "more")
    setup = Setup(folder, "adafaclo", 2, steps=8)
    with started(
        setup, fewer, kill=Kill(rank=1, where="save", point=2, number=signal.SIGTERM)
    ) as processes:
        assert codes_of(processes, fewer, 60) == [STOPPED, STOPPED]
    assert list(published_in(fewer)) == [3, 4]
    assert len(rows_of(fewer)) == 4
    assert gpt2.main([*command(folder, fewer), "--resume", "auto"]) == 0
    assert "with --micro-batch-size 4 (was 2), --world-size 1 (was 2)." in capfd.readouterr().err
    for step in (6, 8):
        remove(published_in(more)[step])
    run(setup, more)
    worst = 0.0
    for out in (fewer, more):
        a, b = rows_of(finished), rows_of(out)
        assert [row["step"] for row in b] == list(range(1, 9))
        worst = max(worst, *(abs(x["loss"] - y["loss"]) for x, y in zip(a, b, strict=True)))
        worst = max(worst, abs(a[-1]["val_loss"] - b[-1]["val_loss"]))
    # Sums over ranks round in another order; the bound is that of any two layouts that train by
    # themselves.
    assert worst <= 1e-4
    figures.append(
        f"resumed on another number of ranks: losses of 8 steps differ by {worst:.1e} at most"
    )


def wait_for_rows(out: Path, count: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        path = out / "metrics.jsonl"
        if path.is_file() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.005)
    raise TimeoutError(f"{out} has not {count} rows after 120 s")


def test_a_killed_rank(folder: Path, figures: list[str]) -> None:
    """A handful of what benchmarks/faults.py does, for AdamW too."""
    optimizer = "adafaclo"
    these, generator = Faults(Setup(folder, optimizer, steps=8)), random.Random(5)
    assert min(these.file_operations) >= 6  # two a save, at least
    for i, where in enumerate(("step", "save")):
        trial = these.trial(these.draw(generator, where), folder / f"{optimizer}-trial{i}")
        figures.append(
            f"killed rank, {optimizer}, {where}: resumed at {trial.resumed}, others left in "
            f"{trial.left_after_s} s"
        )
        assert trial.passed, trial


def test_nobody_waits_for_a_rank_that_stands_still(folder: Path) -> None:
    """One that is there and does nothing is lost after --timeout."""
    out = folder / "still"
    setup = Setup(folder, "adamw", 2, steps=4, extra=("--timeout", "3"))
    with started(
        setup, out, kill=Kill(rank=1, where="save", point=2, number=signal.SIGSTOP)
    ) as processes:
        assert codes_of(processes[:1], out, 60) == [1]
    assert "rank 0 of 2 at step 3, in the checkpoint" in Path(f"{out}.log").read_text()
    assert published_in(out) == {}


def damage(checkpoint: Path, how: str) -> str:
    """Change a published checkpoint; the name of the changed file."""
    data = max(
        (path for path in checkpoint.iterdir() if path.suffix == ".distcp"),
        key=lambda path: path.stat().st_size,
    )
    if how == "byte":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif how == "cut":
        data.write_bytes(data.read_bytes()[:-1])
    elif how == "gone":
        data.unlink()
    elif how == "manifest":
        data = checkpoint / "manifest.json"
        data.write_text(data.read_text().replace('"step": 8', '"step": 9'))
    return data.name


def test_what_cannot_go_on_says_so_and_changes_nothing(
    folder: Path,
    finished: Path,
    learned_weights: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = copy_of(finished, tmp_path / "run")
    newest, middle = published_in(out)[8], published_in(out)[6]
    other = ["--out", str(tmp_path / "new"), "--resume", str(newest)]
    cases = {
        "model": (["--resume", "auto", "--n-head", "2"], "saved with n_head 4, this run has 2"),
        "size": (["--resume", "auto", "--n-embd", "32"], "saved with n_embd 64, this run has 32"),
        "optimizer": (
            [*other, "--optimizer", "mulo"],
            "saved with optimizer adafaclo, this run has mulo",
        ),
        "weights": (["--resume", "auto", "--weights", str(learned_weights["adafaclo"])], "weights"),
        "steps": (
            ["--resume", "auto", "--steps", "7"],
            "saved after step 8, and --steps is 7; pass more",
        ),
        "nothing there": (["--resume", str(tmp_path)], "no published checkpoint there"),
        "no such folder": (
            ["--resume", str(tmp_path / "gone" / "away")],
            "no published checkpoint there",
        ),
        "newer": (["--resume", str(middle)], "step-00000008 of the same run is newer"),
        "used": (["--resume", str(newest), "--out", str(tmp_path)], "is not empty"),
        "keep": (["--save-every", "0", "--keep", "2"], "--keep 2 came without --save-every"),
        "keep none": (["--keep", "0"], "--keep is 0"),
    }
    before = tree(tmp_path)
    for name, (arguments, words) in cases.items():
        assert gpt2.main([*command(folder, out), *arguments]) == 2, name
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, (name, lines)
        assert words in lines[0], (name, lines)
        assert tree(tmp_path) == before, name
    without_out = [word for word in command(folder, out) if word not in ("--out", str(out))]
    assert gpt2.main([*without_out, "--resume", "auto"]) == 2
    assert "pass --out FOLDER" in capsys.readouterr().err


def test_auto_passes_over_a_damaged_checkpoint(
    folder: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on from the one before, says so, and keeps both."""
    for how in ("byte", "manifest"):
        out = copy_of(finished, tmp_path / how)
        name = damage(published_in(out)[8], how)
        assert gpt2.main([*command(folder, out), "--resume", "auto", "--keep", "1"]) == 0, how
        said = capsys.readouterr().err.splitlines()
        (line,) = (line for line in said if "is passed over" in line)
        assert name in line, how
        assert any(f"goes on after step 6 from {out}" in line for line in said), how
        assert list(published_in(out)) == [8]
        assert [path.name for path in (out / "checkpoints").glob("damaged-*")] == [
            "damaged-step-00000008"
        ]
        remove(out / "checkpoints" / "damaged-step-00000008")
        for step in (3, 6):  # which --keep 1 has removed
            shutil.copytree(published_in(finished)[step], out / "checkpoints" / f"step-{step:08d}")
        assert differences(finished, out, 8) == [], how


def test_a_damaged_checkpoint_is_refused_by_name(
    folder: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it is named, and where none is left to go on from: nothing changes."""
    out = copy_of(finished, tmp_path / "run")
    damaged = [damage(path, "byte") for path in published_in(out).values()]
    before = tree(out)
    for words in (["auto"], [str(published_in(out)[8])]):
        assert gpt2.main([*command(folder, out, "--steps", "9"), "--resume", *words]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert damaged[0] in lines[-1], lines
        assert len(lines) == (3 if words == ["auto"] else 1), lines
        assert tree(out) == before
    ranks = Setup(folder, "adafaclo", 2, steps=9)  # and the code on both ranks
    with started(ranks, out) as processes:
        assert codes_of(processes, out, 60) == [2, 2]
    lines = Path(f"{out}.log").read_text().splitlines()
    # torch 2.10 says more
    assert len([line for line in lines if not line.startswith("[Gloo]")]) == 3, lines
    assert tree(out) == before


def test_folders_of_earlier_runs(
    folder: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # done already: nothing to train, and the code of a run that is done; --keep holds for what it
    # finds
    done = copy_of(finished, tmp_path / "done")
    assert gpt2.main(command(folder, done, "--resume", "auto")) == 0
    assert differences(finished, done, 8) == []
    assert gpt2.main(command(folder, done, "--resume", "auto", "--keep", "2")) == 0
    assert list(published_in(done)) == [6, 8]

    # from an older checkpoint, in the same folder: the newer ones and their rows are dropped
    out = copy_of(finished, tmp_path / "run")
    older = published_in(out)[3]
    assert (
        gpt2.main(command(folder, out, "--resume", str(older), "--overwrite", "--steps", "4")) == 0
    )
    assert list(published_in(out)) == [3, 4]
    # validated at the last step, and cosine to another end
    assert rows_of(out) != rows_of(finished)[:4]
    assert [row["step"] for row in rows_of(out)] == [1, 2, 3, 4]

    # into a folder of its own, with rows of the run it left; the newest of a run's folder; --keep
    branch = tmp_path / "branch"
    assert (
        gpt2.main(
            command(
                folder,
                branch,
                "--resume",
                str(finished),
                "--steps",
                "10",
                "--save-every",
                "1",
                "--keep",
                "1",
            )
        )
        == 0
    )
    assert [row["step"] for row in rows_of(branch)] == list(range(1, 11))
    assert rows_of(branch)[:8] == rows_of(finished)
    assert list(published_in(branch)) == [10]
    assert list(published_in(finished)) == [3, 6, 8]

    # a checkpoint away from its run has no rows to bring, which is said
    capsys.readouterr()
    lone = Path(shutil.copytree(published_in(finished)[6], tmp_path / "lone"))
    assert gpt2.main(command(folder, tmp_path / "from_lone", "--resume", str(lone))) == 0
    assert "holds 0 of 6 steps" in capsys.readouterr().err
    assert [row["step"] for row in rows_of(tmp_path / "from_lone")] == [7, 8]
    assert rows_of(tmp_path / "from_lone") == rows_of(finished)[6:]

    assert (
        gpt2.main(command(folder, tmp_path / "nothing", "--resume", str(lone), "--steps", "6")) == 0
    )
    assert rows_of(tmp_path / "nothing") == []

    # --resume auto where nothing was published starts afresh, over what a killed run has left and
    # over nothing else
    left = copy_of(finished, tmp_path / "left")
    (left / "DONE").unlink()
    saved = list(published_in(left).values())
    for token, path in zip("01", saved, strict=False):
        unfinished(path, token)
    (left / "checkpoints" / ".step-00000001.removed").mkdir()
    live = unfinished(saved[2], "2")
    with live.with_suffix(".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a save of a program of another kind
        content = tree(live)
        for extra in (["--resume", "auto"], ["--overwrite"]):
            assert gpt2.main(command(folder, left, *extra, "--steps", "2")) == 0
            assert list(published_in(left)) == [2]
            assert tree(live) == content
            remove(published_in(left)[2])
            (left / "DONE").unlink()
    assert gpt2.main(command(folder, left, "--resume", "auto")) == 0
    assert differences(finished, left, 8) == []
    remove(left / "checkpoints")
    (left / "notes.txt").write_text("mine")
    assert gpt2.main(command(folder, left, "--resume", "auto")) == 2
    assert "is not empty" in capsys.readouterr().err

    # a run in its place leaves no checkpoint of the earlier one for a later --resume auto
    assert gpt2.main(command(folder, left, "--overwrite", "--steps", "2", "--save-every", "0")) == 0
    assert published_in(left) == {}


def unfinished(path: Path, token: str) -> Path:
    """What a save that was killed before it published `path` has left: the partial folder."""
    partial = path.rename(path.with_name(f".{path.name}.{token * 32}.partial"))
    partial.with_suffix(".lock").write_text(_machine())
    return partial


def test_a_folder_is_of_one_run_at_a_time(
    folder: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before its first save a run looks like what a killed one has left. The other leaves it alone,
    with a code that resume_loop.sh tries again.
    """
    out = copy_of(finished, tmp_path / "run")
    young = copy_of(finished, tmp_path / "young")
    remove(young / "checkpoints")
    for used, extra in (
        (young, ["--resume", "auto"]),
        (young, ["--overwrite"]),
        (young, ["--resume", str(finished), "--overwrite"]),
        (out, ["--resume", "auto"]),
        (out, ["--resume", str(out)]),
        (tmp_path / "new", []),
    ):
        with Claim() as claim:
            assert claim.take(used) is None
            before = tree(tmp_path)
            assert gpt2.main(command(folder, used, *extra)) == 1, (used, extra)
            (line,) = capsys.readouterr().err.splitlines()
            assert f"--out {used}: another run is there (process {os.getpid()} on" in line
            assert tree(tmp_path) == before
        assert not (used / ".running").exists()
    assert not (tmp_path / "new").exists()
    # a lock that nobody holds is one that was left, whatever it says
    (out / ".running").write_text("process 1 on far")
    assert gpt2.main(command(folder, out, "--resume", "auto")) == 0
    assert not (out / ".running").exists()
    for odd in ("fifo", "link"):
        os.mkfifo(out / ".running") if odd == "fifo" else (out / ".running").symlink_to("x")
        assert gpt2.main(command(folder, out, "--resume", "auto")) == 2
        assert f"--out {out} cannot be written" in capsys.readouterr().err.splitlines()[-1]
        (out / ".running").unlink(missing_ok=True)
    assert not (out / "x").exists()


def test_runs_that_come_and_go_never_share_a_folder(tmp_path: Path) -> None:
    """Each makes the folder and its lock, and removes both."""
    inside = tmp_path / "inside"

    def take_often(_: int) -> int:
        held = 0
        # a try that finds the lock held is over in no time: each goes on until it had its turns
        deadline = time.monotonic() + 120
        while held < 10 and time.monotonic() < deadline:
            with Claim() as claim:
                if claim.take(tmp_path / "run") is None:
                    inside.touch(exist_ok=False)
                    inside.unlink()
                    held += 1
        return held

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(take_often, range(4))) == [10] * 4
    assert not (tmp_path / "run" / ".running").exists()


def test_a_run_whose_folder_was_removed_leaves_the_lock_of_the_next_one(tmp_path: Path) -> None:
    with Claim() as second:
        with Claim() as first:
            assert first.take(tmp_path / "run") is None
            shutil.rmtree(tmp_path / "run")
            assert second.take(tmp_path / "run") is None
        with Claim() as third:
            assert third.take(tmp_path / "run") is not None
    assert not (tmp_path / "run").exists()


def test_what_differs_is_said_once_and_holds(
    folder: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[Any] = []
    made = Keeper.__init__

    def make(self: Keeper, options: Any, out: Any, learner: Any, *rest: Any, **more: Any) -> None:
        kept.append(learner)
        made(self, options, out, learner, *rest, **more)

    monkeypatch.setattr(Keeper, "__init__", make)
    # in earnest they would stall each other
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    other = ["--weight-decay", "0.5", "--lr", "0.5", "--resume", str(finished), "--steps", "9"]
    assert gpt2.main(command(folder, tmp_path / "other", *other)) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "goes on" in line]
    assert len(told) == 1
    assert told[0].endswith(
        "with --lr 0.5 (was 1.0), --weight-decay 0.5 (was 0.0), --steps 9 (was 8), --threads 2 "
        "(was 1)."
    )
    (group,) = kept[0].optimizer.param_groups
    assert (group["weight_decay"], int(group["step"])) == (0.5, 9)
    assert rows_of(tmp_path / "other")[-1]["lr"] == pytest.approx(0.05)


def test_a_checkpoint_that_cannot_be_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on and tries again; where the last step is not saved, its code says so."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "checkpoints").write_text("a file in its place")
    assert gpt2.main(command(folder, out, "--overwrite")) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "was not written" in line]
    starts = [f"gpt2.py: the checkpoint of step {step} was not written" for step in range(3, 9)]
    assert [line[: len(starts[0])] for line in lines] == starts
    assert all("checkpoints" in line for line in lines)
    assert len(rows_of(out)) == 8


def test_a_full_disk_loses_no_row(
    folder: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Metrics and checkpoints that fail for some steps: one line each, and all is there at last."""
    out, add = tmp_path / "run", Watch.add
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def add_to_a_full_disk(self: Watch, row: Row) -> None:
        if row.step == 2:
            room = (out / "metrics.jsonl").stat().st_size + 5  # a part of a row
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        if row.step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        add(self, row)

    monkeypatch.setattr(Watch, "add", add_to_a_full_disk)
    try:
        assert gpt2.main(command(folder, out)) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    lines = [line for line in capsys.readouterr().err.splitlines() if "File too large" in line]
    assert len(lines) == 3, lines
    assert f"{out / 'metrics.jsonl'} cannot be written" in lines[0]
    assert f"{out / 'checkpoints' / 'step-00000003'}" in lines[1]
    assert [row["step"] for row in rows_of(out)] == list(range(1, 9))
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (5, 6, 8)
    ]
    assert set(published_in(out)) == {5, 6, 8}


def test_ctrl_c_ends_with_a_code_of_its_own(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "add", interrupted)
    monkeypatch.setenv("EXIT_CODE_FILE", str(tmp_path / "code"))
    assert gpt2.main(command(folder, tmp_path / "run")) == 128 + signal.SIGINT
    assert "interrupted; the same command" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "code").read_text() == "130\n"


def test_a_run_that_is_done_stays_so_whatever_stops_what_trains_beside_it(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add = Watch.add

    def interrupted(watch: Watch, row: Row) -> None:
        if watch.folder.name == "beside":
            raise KeyboardInterrupt
        add(watch, row)

    monkeypatch.setattr(Watch, "add", interrupted)
    out, words = tmp_path / "run", command(folder, tmp_path / "run", "--beside", "adamw")
    at = words.index("--save-every")
    del words[at : at + 2]
    assert gpt2.main(words) == 128 + signal.SIGINT
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].endswith("the run is done; adamw beside it was stopped")
    assert "validation" in said.out  # its summary
    before = tree(out)
    # without a checkpoint there is nothing to go on from, and the run is no leftover
    assert gpt2.main([*words, "--resume", "auto"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert tree(out) == before


def test_a_stream_goes_on_in_the_middle(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Tokens in their order: each window once, whatever stopped the run, also where the batch is
    another one from then on.
    """
    places: list[int] = []
    read = Tokens.in_order

    def noted(self: Tokens, first: int, count: int) -> Any:
        places.append(first)
        return read(self, first, count)

    monkeypatch.setattr(Tokens, "in_order", noted)
    whole, out = tmp_path / "whole", tmp_path / "out"
    extra = ["--order", "stream"]
    assert gpt2.main(command(folder, whole, *extra)) == 0
    assert places == list(range(0, 32, 4))
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        assert gpt2.main(command(folder, out, *extra)) == STOPPED
    places.clear()
    assert gpt2.main(command(folder, out, *extra, "--resume", "auto")) == 0
    assert places == [20, 24, 28]
    assert rows_of(out) == rows_of(whole)
    assert gpt2.main(command(folder, out, *extra, "--resume", "auto", "--block-size", "7")) == 2
    assert (
        "this run has 7: tokens would be lost or repeated; pass the same."
        in capsys.readouterr().err
    )
    places.clear()
    half = [*extra, "--batch-size", "2", "--steps", "10", "--resume"]
    assert gpt2.main(command(folder, tmp_path / "half", *half, str(published_in(whole)[6]))) == 0
    assert places == [24, 26, 28, 30]
    places.clear()
    assert gpt2.main(command(folder, tmp_path / "half", *half, "auto", "--steps", "11")) == 0
    assert places == [32]


def test_rows_of_a_killed_run(tmp_path: Path) -> None:
    rows = [Row(step, 1 / 3 * step, None, 1.0, 2.0, 0.5, 0.1) for step in range(1, 6)]
    lines = [json.dumps(row.as_dict()) for row in rows]
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join([*lines[:4], "[]", '{"step": 9}', lines[1], lines[4][:20]])
    )
    assert rows_until(tmp_path, 3) == rows[:3]
    assert rows_until(tmp_path, 9) == rows[:4]
    assert rows_until(tmp_path / "gone", 9) == []


def test_torchrun_starts_ranks_again_and_passes_sigterm_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank is killed: torchrun starts all of them again, from the newest checkpoint on. Then as a
    scheduler ends a job: torchrun gets SIGTERM, and its ranks have half a minute to save. What they
    saved goes on on one, and all of it is the curve of one that nothing disturbed.
    """
    out, whole = folder / "torchrun", folder / "undisturbed"
    words = Setup(folder, "adafaclo", 2, steps=100_000, extra=("--eval-every", "0")).command(out)
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max-restarts=1",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (
        (folder / "torchrun.log").open("w") as log,
        subprocess.Popen(
            [sys.executable, *launch, str(ROOT / "launch" / "gpt2.py"), *words],
            env=environment,
            stderr=log,
        ) as process,
    ):
        try:
            wait_for_rows(out, 7)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
            begin = wait_for_resumption(out)
            wait_for_rows(out, (out / "metrics.jsonl").read_text().count("\n") + 2)
            process.terminate()
            process.wait(60)
        finally:
            process.kill()
    assert process.returncode == 1  # torchrun's own; a rank's is 143
    step = max(published_in(out))
    assert begin >= 3
    assert begin % 3 == 0  # a save of the run itself, none of what was left of its ranks
    assert f"SIGTERM: stopped after step {step}, saved in" in Path(log.name).read_text()
    assert rows_of(out)[-1]["step"] == step
    stop_at(step + 2, monkeypatch)
    assert gpt2.main(words) == STOPPED
    assert "--world-size 1 (was 2)" in capsys.readouterr().err
    assert gpt2.main([str(whole) if word == str(out) else word for word in words]) == STOPPED
    a, b = rows_of(whole), rows_of(out)
    assert [row["step"] for row in b] == list(range(1, step + 4))
    assert max(abs(x["loss"] - y["loss"]) for x, y in zip(a, b, strict=True)) <= 1e-4


def wait_for_resumption(out: Path) -> int:
    """The step that a run went on from, as soon as it did."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            return int(json.loads((out / "config.json").read_text())["resumed_from"]["step"])
        except (KeyError, ValueError):  # not yet, or half-written
            time.sleep(0.005)
    raise TimeoutError(f"{out} was not gone on with after 120 s")

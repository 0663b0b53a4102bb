"""Kill a rank of a training run at a random point of a step or a save, start the run again, and
compare: bit for bit the same.

    python benchmarks/faults.py                     # 50 trials, about 10 minutes on two CPU cores

Every trial is a run of launch/gpt2.py on real gloo processes. One rank gets SIGKILL: at a random
moment between two rows of metrics.jsonl ("step"), or before a random file operation among its
checkpoints ("save": create, open, rename, remove). The others must leave by themselves, with exit
code 1. The same command with --resume auto then has to end with the parameters, the state and the
losses of a run that nothing disturbed. Processes are forked from one that has imported PyTorch,
which saves seconds in each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import gpt2
import numpy as np
import torch
from bench_demo import environment
from checkpoints import FOLDER, published_in
from data import write_tokens
from environment import free_port
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "faults.json"
OPTIMIZERS = {
    "adafaclo": ["--optimizer", "adafaclo", "--weights", "demo"],
    "adamw": ["--optimizer", "adamw"],
}
# What a run imports sooner or later, in the order of its weight.
PRELOAD = [
    "gpt2",
    "torch._dynamo",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    "pylo_dist.checkpoint",
]
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
TIMEOUT_S = 30  # --timeout: the longest that a rank may wait for one that is dead


@dataclass(frozen=True, slots=True)
class Setup:
    """A run to disturb: so small that starting it takes most of the time, and nothing of it is left
    out.
    """

    folder: Path  # of all its files
    optimizer: str
    ranks: int = 2
    steps: int = 12
    save_every: int = 3
    extra: tuple[str, ...] = ()  # arguments

    def command(self, out: Path) -> list[str]:
        size = [
            "--preset",
            "nano",
            "--block-size",
            "16",
            "--batch-size",
            "4",
            "--steps",
            self.steps,
            "--eval-every",
            "4",
        ]
        run = [
            "--eval-batches",
            "1",
            "--device",
            "cpu",
            "--threads",
            "1",
            "--timeout",
            TIMEOUT_S,
            "--schedule",
            "cosine",
        ]
        files = [
            "--data",
            self.folder / "tokens",
            "--out",
            out,
            "--save-every",
            self.save_every,
            "--keep",
            2,
        ]
        words = (*size, *run, *files, "--resume", "auto", *OPTIMIZERS[self.optimizer], *self.extra)
        return [str(word) for word in words]


@dataclass(frozen=True, slots=True)
class Kill:
    """When to kill which rank.

    Attributes:
        rank: the victim.
        where: "step": `delay_s` after the row of step `point` was written; "save": before the
            `point`-th file operation of the victim in the folder of checkpoints, counted from 1.
        number: of the signal.
    """

    rank: int
    where: str
    point: int
    delay_s: float = 0.0
    number: int = signal.SIGKILL


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of a kill.

    Attributes:
        hit: whether the victim was alive to be killed.
        saved: step of the newest checkpoint published at the kill; 0: none.
        complete: whether that was of the last step, after which no rank needs another.
        in_save: whether the kill left a checkpoint half-written or half-removed.
        left_after_s: how long the last rank survived the kill.
        codes: exit codes of the ranks.
        resumed: the step that the second run went on from; 0: it started afresh.
        differences: what is not the same bits as in the undisturbed run, by name.
    """

    optimizer: str
    kill: Kill
    hit: bool
    saved: int
    complete: bool
    in_save: bool
    left_after_s: float
    codes: list[int]
    resumed: int
    differences: list[str]

    @property
    def passed(self) -> bool:
        others = [code for rank, code in enumerate(self.codes) if rank != self.kill.rank]
        codes = {0, 1} if self.complete else {1}
        left = not self.hit or (set(others) <= codes and self.left_after_s < TIMEOUT_S + 10)
        return left and self.resumed == self.saved and not self.differences


# -------------------------------------------------------------------------------------------- ranks


def rank_main(
    rank: int, ranks: int, port: int, command: list[str], log: str, kill: Kill | None, counted: str
) -> None:
    """One rank, as torchrun would start it; it sends itself the signal of a `kill` that is for it
    and "save".
    """
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    count, needle = 0, f"{os.sep}{FOLDER}{os.sep}"
    mine = kill is not None and kill.rank == rank and kill.where == "save"

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in FILE_EVENTS and needle in str(arguments[0]):
            count += 1
            if mine and count == kill.point:
                os.kill(os.getpid(), kill.number)

    sys.addaudithook(audit)
    code = gpt2.main(command)
    if counted:
        Path(counted).write_text(str(count))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what a fork has inherited is not its own to tidy


@contextmanager
def started(
    setup: Setup, out: Path, *, kill: Kill | None = None, counted: Path | None = None
) -> Iterator[list[Any]]:
    """The processes of a run; none is left when the block ends."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port, processes = free_port(), []
    for rank in range(setup.ranks):
        counts = "" if counted is None else f"{counted}.{rank}"
        arguments = (rank, setup.ranks, port, setup.command(out), f"{out}.log", kill, counts)
        processes.append(context.Process(target=rank_main, args=arguments, daemon=True))
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def codes_of(processes: list[Any], out: Path, limit_s: float) -> list[int]:
    """Exit codes of processes that leave by themselves. RuntimeError with their log when one is
    still there after `limit_s`.
    """
    end = time.monotonic() + limit_s
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            raise RuntimeError(
                f"a rank is still there after {limit_s} s:\n{Path(f'{out}.log').read_text()}"
            )
    return [process.exitcode for process in processes]


def run(setup: Setup, out: Path, counted: Path | None = None) -> None:
    """A run that nothing disturbs. RuntimeError when it fails."""
    with started(setup, out, counted=counted) as processes:
        codes = codes_of(processes, out, 300)
    if any(codes):
        raise RuntimeError(f"exit codes {codes}:\n{Path(f'{out}.log').read_text()}")


# ---------------------------------------------------------------------------------------- comparing


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without its clocks."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: row[key] for key in ("step", "loss", "val_loss", "lr") if key in row} for row in rows
    ]


def flat(name: str, value: Any) -> dict[str, Any]:
    """A nested dict or list with one key for each leaf."""
    if not isinstance(value, dict | list | tuple):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {
        key: leaf for inner, entry in items for key, leaf in flat(f"{name}/{inner}", entry).items()
    }


def content(checkpoint: Path) -> dict[str, Any]:
    """Everything in a checkpoint, by name."""
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        dcp_to_torch_save(checkpoint, file.name)
        return flat("", torch.load(file.name, weights_only=False))


def differences(reference: Path, out: Path, steps: int) -> list[str]:
    """Names of what the two runs did not end with alike: rows and last checkpoint to the bit, and
    which checkpoints there are.
    """
    found = [] if rows_of(reference) == rows_of(out) else ["metrics.jsonl"]
    if sorted(os.listdir(reference / FOLDER)) != sorted(os.listdir(out / FOLDER)):
        found.append(FOLDER)
    wanted, got = (content(published_in(folder)[steps]) for folder in (reference, out))
    if wanted.keys() != got.keys():
        found.append("keys")
    for name in wanted.keys() & got.keys():
        a, b = wanted[name], got[name]
        if isinstance(a, Tensor):
            # as bytes: a NaN equals itself, and 0 is not -0
            same = (
                a.shape == b.shape
                and a.dtype == b.dtype
                and a.numpy().tobytes() == b.numpy().tobytes()
            )
        else:
            same = a == b
        if not same:
            found.append(name)
    return sorted(found)


# ------------------------------------------------------------------------------------------- trials


class Faults:
    """The undisturbed run of a setup, and trials beside it."""

    def __init__(self, setup: Setup) -> None:
        """Runs it."""
        self.setup = setup
        self.reference = setup.folder / f"{setup.optimizer}-{setup.ranks}"
        counted = setup.folder / "count"
        run(setup, self.reference, counted)
        # of each rank, in its whole run
        self.file_operations = [
            int(Path(f"{counted}.{rank}").read_text()) for rank in range(setup.ranks)
        ]
        written = [
            (path.stat().st_mtime, step) for step, path in published_in(self.reference).items()
        ]
        (first, at), (last, end) = min(written), max(written)
        self.step_s = (last - first) / (end - at)  # with its share of a save

    def draw(self, generator: random.Random, where: str) -> Kill:
        """A random kill: every rank and every point is as likely."""
        rank = generator.randrange(self.setup.ranks)
        if where == "save":
            return Kill(rank, where, generator.randint(1, self.file_operations[rank]))
        return Kill(
            rank,
            where,
            generator.randint(0, self.setup.steps - 1),
            generator.uniform(0, self.step_s),
        )

    def trial(self, kill: Kill, out: Path) -> Trial:
        """One run that is killed and one that goes on."""
        metrics = out / "metrics.jsonl"
        with started(self.setup, out, kill=kill) as processes:
            victim = processes[kill.rank]
            if kill.where == "step":
                while (
                    victim.is_alive()
                    and (metrics.read_text().count("\n") if metrics.is_file() else -1) < kill.point
                ):
                    time.sleep(0.001)
                time.sleep(kill.delay_s)
                victim.kill()
            victim.join(120)
            dead = time.monotonic()
            codes = codes_of(processes, out, TIMEOUT_S + 60)
            left_after_s = time.monotonic() - dead
        saved = max(published_in(out), default=0)
        names = [path.name for path in (out / FOLDER).iterdir()] if (out / FOLDER).is_dir() else []
        run(self.setup, out)
        resumed = json.loads((out / "config.json").read_text()).get("resumed_from", {"step": 0})[
            "step"
        ]
        return Trial(
            optimizer=self.setup.optimizer,
            kill=kill,
            hit=codes[kill.rank] == -signal.SIGKILL,
            saved=saved,
            complete=saved == self.setup.steps,
            in_save=any(name.startswith(".") for name in names),
            left_after_s=round(left_after_s, 2),
            codes=codes,
            resumed=resumed,
            differences=differences(self.reference, out, self.setup.steps),
        )


def prepare(folder: Path) -> None:
    """Tokens of a run: words in random order."""
    (folder / "tokens").mkdir()
    generator = np.random.default_rng(0)
    words = [b"the ", b"cat ", b"sat ", b"on ", b"a ", b"mat.\n"]
    for name in ("train.bin", "val.bin"):
        text = b"".join(words[i] for i in generator.integers(0, len(words), 2000))
        write_tokens(folder / "tokens" / name, np.frombuffer(text, np.uint8))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kill a rank at random, resume, compare bits.")
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    found = environment()  # before the runs: the commit that was measured
    generator = random.Random(args.seed)
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        faults = [Faults(Setup(folder, optimizer, args.ranks)) for optimizer in OPTIMIZERS]
        for i in range(args.trials):
            this = faults[i % len(faults)]
            trial = this.trial(
                this.draw(generator, ("step", "save")[i // len(faults) % 2]), folder / f"trial{i}"
            )
            trials.append(trial)
            print(
                f"{i + 1}/{args.trials} {'passed' if trial.passed else 'FAILED'}: {trial}",
                file=sys.stderr,
                flush=True,
            )
    hits = [trial for trial in trials if trial.hit]
    result = {
        "what": "kill -9 of a rank of launch/gpt2.py, restart with --resume auto, compared bit for "
        "bit with an undisturbed run",
        **found,
        "settings": {
            "ranks": args.ranks,
            "seed": args.seed,
            "timeout_s": TIMEOUT_S,
            "command": faults[0].setup.command(Path("OUT")),
        },
        "trials": len(trials),
        "passed": sum(trial.passed for trial in trials),
        "killed": len(hits),
        "killed_while_a_checkpoint_was_unfinished": sum(trial.in_save for trial in hits),
        "resumed_from_a_checkpoint": sum(trial.resumed > 0 for trial in hits),
        "others_left_after_s": {
            "median": median(trial.left_after_s for trial in hits),
            "longest": max(trial.left_after_s for trial in hits),
        },
        "runs": [asdict(trial) for trial in trials],
    }
    result["settings"]["command"] = [
        word.replace(name, "FOLDER") for word in result["settings"]["command"]
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=2))
    return 0 if result["passed"] == len(trials) else 1


if __name__ == "__main__":
    sys.exit(main())

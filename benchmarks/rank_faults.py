"""Faults among real ranks, one by one, and long runs, for campaign.py: signals, failing disks and
callbacks at random moments of a construction, a step, a save, a load. Writes the folder it is
given.

A run is two processes on gloo that meet at env://, where rank 0 keeps the store. The victim does it
to itself: a thread of it sends the signal some milliseconds after a phase has begun.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing as mp
import os
import random
import resource
import shutil
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.nn.functional  # before the ranks are forked, as the others
from environment import free_port
from outcomes import BARE, DIED, GROWS, HALF, RIGHT, WAITS, Case, Outcome
from torch import nn

import pylo_dist
import pylo_dist.checkpoint
from support.permissions import permission_bits_hold

TIMEOUT_S = 4.0  # of the process group
ALLOWED_S = 3.0  # beyond it, in which ranks find out who is lost
SLACK_S = 5.0  # beyond that, since several runs share the machine
PHASES = ("construction", "step", "save", "load", "async save")
SIGNALS = {name: getattr(signal, f"SIG{name}") for name in ("KILL", "STOP", "TERM", "INT")}
DISKS = ("disk full", "few descriptors", "folder removed", "folder read-only")
CALLBACKS = ("closure", "hook")
# what a run does, in order; each save has a name of its own
SCRIPT = (
    "construction",
    "step",
    "save",
    "step",
    "load",
    "async save",
    "step",
    "save",
    "load",
    "step",
)


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to whom.

    Attributes:
        what: of SIGNALS, DISKS or CALLBACKS.
        place: in SCRIPT.
        delay_s: after the phase has begun.
        amount: bytes that fit into a file, or descriptors that are left.
    """

    rank: int
    what: str
    place: int
    delay_s: float
    amount: int

    @property
    def phase(self) -> str:
        return SCRIPT[self.place]


def draw(rng: random.Random) -> Fault:
    what = rng.choice((*SIGNALS, *SIGNALS, *DISKS, *CALLBACKS))
    if what in CALLBACKS:
        phases: tuple[str, ...] = ("step",)
    elif what in DISKS:
        phases = ("save", "load") if "folder" in what else ("save", "load", "construction")
    else:
        phases = PHASES
    phase = rng.choice(phases)
    place = rng.choice([i for i, name in enumerate(SCRIPT) if name == phase])
    amount = rng.randint(0, 4) if what == "few descriptors" else rng.choice((0, 100, 5000, 20000))
    return Fault(rng.randrange(2), what, place, rng.uniform(0, 0.05), amount)


# -------------------------------------------------------------------------------------------- ranks


@contextlib.contextmanager
def _limited(fault: Fault | None, folder: Path) -> Iterator[None]:
    """The victim's phase: signals, removals and permission bits come while it runs, bits and limits
    hold until it ends.
    """
    if fault is None or fault.what in CALLBACKS:
        yield
        return
    if fault.what in SIGNALS:
        threading.Timer(fault.delay_s, os.kill, (os.getpid(), SIGNALS[fault.what])).start()
        yield
        return
    if fault.what == "folder removed":
        remover = threading.Timer(fault.delay_s, shutil.rmtree, (folder,), {"ignore_errors": True})
        remover.start()
        yield
        remover.join()
        return
    if fault.what == "folder read-only":
        locker = threading.Timer(fault.delay_s, _set_bits, (folder, 0o555))
        locker.start()
        try:
            yield
        finally:
            locker.join()
            _set_bits(folder, 0o755)
        return
    kind, limit = resource.RLIMIT_FSIZE, fault.amount
    if fault.what == "few descriptors":
        kind = resource.RLIMIT_NOFILE
        limit += max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def _set_bits(folder: Path, bits: int) -> None:
    """Of a folder and those in it."""
    for path in (folder, *folder.glob("*"), *folder.glob(".*")):
        with contextlib.suppress(FileNotFoundError):
            path.chmod(bits)


class _Run:
    """The phases of SCRIPT on one rank."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank, self.folder, self.saved = rank, folder, 0
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
        self.optimizer: Any = None
        self.fails = ""

    def do(self, phase: str) -> None:
        getattr(self, phase.replace(" ", "_"))()

    def construction(self) -> None:
        self.optimizer = pylo_dist.ZeroOptimizer(
            self.model, pylo_dist.AdafacLO, weights="demo", bucket_cap_mb=1e-4, timeout=TIMEOUT_S
        )
        self.optimizer.register_step_pre_hook(lambda *_: self._fail("hook"))

    def _fail(self, here: str) -> None:
        if self.fails == here:
            raise OSError(f"of the {here}")

    def step(self) -> None:
        def closure() -> Any:
            self.optimizer.zero_grad()
            loss = self.model(torch.full((2, 6), self.rank + 1.0)).square().mean()
            loss.backward()
            self._fail("closure")
            return loss

        self.optimizer.step(closure)

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def save(self) -> None:
        pylo_dist.checkpoint.save(
            self.folder / f"{self.saved + 1}", self.state(), meta={"step": self.saved + 1}
        )
        self.saved += 1

    def load(self) -> None:
        pylo_dist.checkpoint.load(self.folder / f"{self.saved}", self.state())

    def async_save(self) -> None:
        place = self.folder.parent / "async"
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        dcp.async_save(state, checkpoint_id=place).result()

    def values(self) -> list[Any]:
        return [param.detach().clone() for param in self.model.parameters()]


def _rank(rank: int, port: int, folder: Path, fault: Fault, report: Any) -> None:
    with contextlib.suppress(ValueError):  # a parent may have ignored it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    out = os.open(folder.parent / f"said{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    held = contextlib.ExitStack()  # for as long as this process lives
    if fault.what == "folder read-only":
        held.enter_context(permission_bits_hold())
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2"
    )
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    run = _Run(rank, folder)
    place = 0
    try:
        while place < len(SCRIPT):
            phase, mine = SCRIPT[place], fault.rank == rank and fault.place == place
            faulty = fault.place == place and fault.what not in SIGNALS
            before = run.values()
            if mine:
                run.fails = fault.what if fault.what in CALLBACKS else ""
                report.send(("hit", time.monotonic() + fault.delay_s))
            try:
                with _limited(fault if mine else None, folder):
                    run.do(phase)
            except Exception as error:
                if not faulty or run.optimizer is None:
                    raise
                same = all(map(torch.equal, before, run.values()))
                report.send(("error", phase, type(error).__name__, str(error)[:300], same))
                folder.mkdir(exist_ok=True)
                if fault.what == "folder read-only":
                    dist.barrier()  # the victim has given the bits back
                run.fails = ""
                if fault.what != "folder removed":
                    fault = Fault(-1, "", -1, 0, 0)  # once more, without it
                    continue
            if place == fault.place and fault.what == "folder removed":
                run.do("step")  # but there is nothing to load any more
                break
            place += 1
        report.send(("end", time.monotonic()))
    except KeyboardInterrupt:
        report.send(("interrupted", SCRIPT[place], time.monotonic()))
    except BaseException as error:
        report.send(
            (
                "left",
                SCRIPT[min(place, len(SCRIPT) - 1)],
                type(error).__name__,
                str(error)[:400],
                time.monotonic(),
                traceback.format_exc()[-1500:],
            )
        )
    os._exit(0)


# ------------------------------------------------------------------------------------------- trials

MEANT = ("CommunicationError", "PeerError", "CheckpointError", "ValueError", "TypeError")


def trial(fault: Fault, folder: Path) -> Outcome:
    """One run with a fault, and what it leaves behind."""
    what, saves, port = f"{asdict(fault)} in {fault.phase}", folder / "saves", free_port()
    saves.mkdir()
    context = mp.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    processes = [
        context.Process(target=_rank, args=(rank, port, saves, fault, pipes[rank][1]))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    limit = TIMEOUT_S + ALLOWED_S + SLACK_S
    end = time.monotonic() + 30 + limit
    stands = fault.what == "STOP"
    waited = [processes[1 - fault.rank]] if stands else processes
    try:
        for process in waited:
            process.join(max(0.0, end - time.monotonic()))
        late = [
            i for i, process in enumerate(processes) if process in waited and process.is_alive()
        ]
    finally:
        for process in processes:
            process.kill()
            process.join()
    messages: list[list[tuple[Any, ...]]] = [[], []]
    for rank, (receiver, _) in enumerate(pipes):
        with contextlib.suppress(EOFError):
            while receiver.poll():
                messages[rank].append(receiver.recv())
    said = f"{what}: {messages}"[:700]
    place = f"{fault.what} in {fault.phase}"
    if late:
        return Outcome(WAITS, f"ranks {late} are still there; {said}", place)
    return _judged(fault, messages, [p.exitcode for p in processes], saves, said, place)


def _judged(
    fault: Fault,
    messages: list[list[tuple[Any, ...]]],
    codes: list[int | None],
    saves: Path,
    said: str,
    place: str,
) -> Outcome:
    hit = next((message[1] for message in messages[fault.rank] if message[0] == "hit"), None)
    if hit is None:
        return Outcome(BARE, f"never came to it; {said}", f"{place}: before")
    victims = fault.what in SIGNALS
    for rank, heard in enumerate(messages):
        if rank == fault.rank and fault.what in ("KILL", "STOP", "TERM"):
            continue
        if codes[rank] != 0:
            return Outcome(DIED, f"rank {rank} ended with {codes[rank]}; {said}", place)
        last = heard[-1] if heard else ("nothing",)
        when = {"end": 1, "interrupted": 2, "left": 4}.get(last[0])
        if when is None:
            return Outcome(DIED, f"rank {rank} said nothing at its end; {said}", place)
        if victims and last[when] - hit > TIMEOUT_S + ALLOWED_S + SLACK_S:
            return Outcome(WAITS, f"{last[when] - hit:.0f} s; {said}", place)
        if last[0] == "left":
            torchs = "async" in last[1]  # which is torch's own
            # on the rank itself the system's own words will do
            own = rank == fault.rank and "Too many open files" in last[3]
            built = fault.phase == "construction" and (last[2] in MEANT or own)
            if not victims and not built:
                return Outcome(HALF, f"did not go on; {said}", place)
            if last[2] not in MEANT and not torchs and not own:
                return Outcome(BARE, said, f"{place}: {last[2]}")
            if last[2] == "CommunicationError" and " in " not in last[3]:
                return Outcome(BARE, said, f"{place}: no phase named")
        if last[0] == "interrupted" and fault.what != "INT":  # of one rank, or told to all
            return Outcome(BARE, said, place)
    return _left_behind(fault, messages, saves, said, place)


def _left_behind(
    fault: Fault, messages: list[list[tuple[Any, ...]]], saves: Path, said: str, place: str
) -> Outcome:
    """Errors that all ranks had alike, and folders that are whole or not there."""
    errors = [[m for m in heard if m[0] == "error"] for heard in messages]
    if bool(errors[0]) != bool(errors[1]):
        return Outcome(HALF, f"one rank alone had an error; {said}", place)
    for rank, (error,) in ((rank, found) for rank, found in enumerate(errors) if found):
        name, same = error[2], error[4]
        own = fault.what in CALLBACKS and rank == fault.rank
        if name not in MEANT and not own:
            return Outcome(BARE, said, f"{place}: {name}")
        if fault.what in CALLBACKS and not own and name != "PeerError":
            return Outcome(BARE, said, f"{place}: {name}")
        if not same:
            return Outcome(HALF, f"parameters changed; {said}", place)
    for folder in pylo_dist.checkpoint.published(saves):
        try:
            pylo_dist.checkpoint.verify(folder)
        except Exception as error:
            if fault.what == "folder removed":
                continue
            return Outcome(HALF, f"{folder.name} was published and is {error}; {said}", place)
    left = [path.name for path in saves.glob(".*")] if saves.is_dir() else []
    if left and fault.what in ("disk full", "few descriptors"):
        return Outcome(HALF, f"{left} left behind; {said}", place)
    return Outcome(RIGHT, said)


def among_ranks(prepared: Path) -> Case:
    """Signals, full disks, exhausted descriptors, removed folders and callbacks that raise."""
    return lambda rng, folder: trial(draw(rng), folder)


# -------------------------------------------------------------------------------------------- soaks

STEPS, EVERY, SAVE_EVERY = 1500, 25, 100
# per step: what is more than noise
MOST = {"rss_bytes": 1500.0, "descriptors": 0.002, "threads": 0.002, "store_keys": 0.01}


def _figures() -> dict[str, float]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {
        "rss_bytes": float(pages * resource.getpagesize()),
        "descriptors": float(len(os.listdir("/proc/self/fd"))),
        "threads": float(len(os.listdir("/proc/self/task"))),
    }
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
        with contextlib.suppress(RuntimeError):
            found["store_keys"] = float(store.num_keys())
    return found


def slopes(samples: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Per step, of the second half of the samples."""
    half = samples[len(samples) // 2 :]
    steps = [step for step, _ in half]
    return {
        name: float(np.polyfit(steps, [found[name] for _, found in half], 1)[0])
        for name in half[0][1]
    }


def _soaked(rank: int, ranks: int, port: int, folder: Path, steps: int, report: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if ranks > 1:
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks)
        )
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    run = _Run(rank, folder)
    run.construction()
    samples = []
    for step in range(1, steps + 1):
        run.step()
        if step % SAVE_EVERY == 0:
            run.save()
            run.load()
            if ranks > 1:
                dist.barrier()
            if rank == 0:
                shutil.rmtree(folder / str(run.saved))
        if step % EVERY == 0:
            samples.append((step, _figures()))
    report.send(slopes(samples))
    os._exit(0)


def soaked(ranks: int, folder: Path, steps: int = STEPS) -> Outcome:
    """A long run; the slopes of what must not grow."""
    context, port = mp.get_context("fork"), free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        context.Process(target=_soaked, args=(rank, ranks, port, folder, steps, pipes[rank][1]))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        process.kill()
        process.join()
    if any(process.exitcode for process in processes):
        return Outcome(DIED, f"exit codes {[process.exitcode for process in processes]}", "soak")
    found = [receiver.recv() for receiver, _ in pipes]
    worst = {name: max(one[name] for one in found) for name in found[0]}
    said = f"{ranks} ranks, {steps} steps, per step: " + json.dumps(
        {name: round(value, 4) for name, value in worst.items()}
    )
    grown = [name for name, value in worst.items() if value > MOST[name]]
    return Outcome(GROWS, said, ", ".join(grown)) if grown else Outcome(RIGHT, said)


def soak(ranks: int) -> Callable[[Path], Case]:
    """A run of many steps with saves and loads among them."""
    return lambda prepared: lambda rng, folder: soaked(ranks, folder)

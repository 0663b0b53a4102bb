"""Thousands of odd inputs and faults, each of them right or of a named class of faults.

    python benchmarks/campaign.py                        # all of it, about 25 minutes on two cores
    python benchmarks/campaign.py --share 0.01           # a hundredth of it
    python benchmarks/campaign.py --root ../other        # the same of another checkout
    python benchmarks/campaign.py --only checkpoints:17  # one case again, with its traceback

A case is drawn from the seed, its part and its number alone, so that it can be had again. Right is
an outcome where what was wanted happens, or an error says by name what cannot be served; all else
is a fault. What a case needs is in hostile_inputs.py (files, servers, arguments) and rank_faults.py
(signals and failing disks among ranks, long runs). `faults.py` asks more of one fault: whether a
killed run of launch/gpt2.py goes on bit for bit.

Cases run in processes that are ended when they take too long. Outcomes are appended to a journal as
they come; started again with the same --work, a campaign goes on.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing as mp
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from outcomes import BARE, CLASSES, DIED, RIGHT, WAITS, Case, Outcome

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
EXAMPLES = 3  # of each kind of fault, in the result
WORKERS = 2
STACKS = "stacks"  # a worker's file, of where it waits
_INSIDE = "PYLO_DIST_CAMPAIGN"  # set where the paths of the checkout are


@dataclass(frozen=True, slots=True)
class Part:
    """Cases of one sort.

    Attributes:
        cases: how many a whole campaign has.
        prepare: called once, with a folder of its own, in the process that will run cases.
        limit_s: after which a case is taken for a wait without end.
    """

    name: str
    cases: int
    prepare: Callable[[Path], Case]
    limit_s: float = 10.0


def parts() -> list[Part]:
    import hostile_inputs as inputs
    import rank_faults as faults

    return [
        Part("checkpoints", 6000, inputs.checkpoints),
        Part("weights", 4500, inputs.weights),
        Part("hub", 200, inputs.hub, 60.0),
        Part("constructors", 1000, inputs.constructors),
        Part("command lines", 3000, inputs.command_lines),
        Part("JSON", 5000, inputs.json_parameters),
        Part("faults", 200, faults.among_ranks, 120.0),
        Part("soak of 1", 1, faults.soak(1), 900.0),
        Part("soak of 2", 1, faults.soak(2), 900.0),
    ]


def drawn(seed: int, part: str, number: int) -> random.Random:
    """The generator of a case."""
    return random.Random(f"{seed}/{part}/{number}")


# ---------------------------------------------------------------------------------------- processes


def _work(connection: Connection, part: Part, seed: int, folder: Path) -> None:
    """Run the cases whose numbers come."""
    stacks = (folder / STACKS).open("w")
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")
    (folder / "tmp").mkdir()
    (folder / "prepared").mkdir()
    case = part.prepare(folder / "prepared")
    connection.send(None)
    while (number := connection.recv()) is not None:
        own = folder / "case"
        own.mkdir()
        faulthandler.dump_traceback_later(part.limit_s - 1, file=stacks)
        try:
            outcome = case(drawn(seed, part.name, number), own)
        except BaseException as error:  # of the campaign itself
            last = traceback.extract_tb(error.__traceback__)[-1]
            outcome = Outcome(
                BARE, f"the campaign: {error!r}", f"campaign {last.filename}:{last.lineno}"
            )
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(own, ignore_errors=True)
        connection.send((number, outcome))
    os._exit(0)


class _Worker:
    """A process that runs cases of a part, one at a time."""

    def __init__(self, part: Part, seed: int, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder = folder
        self.part, self.number, self.ready = part, -1, False
        self.connection, other = mp.Pipe()
        self.process = mp.get_context("fork").Process(
            target=_work, args=(other, part, seed, folder)
        )
        self.process.start()
        other.close()
        self.since = time.monotonic()

    def give(self, number: int | None) -> None:
        self.number, self.since = -1 if number is None else number, time.monotonic()
        self.connection.send(number)

    def late(self) -> bool:
        return time.monotonic() - self.since > self.part.limit_s + (0 if self.ready else 120)

    def waiting(self) -> Outcome:
        """Where the case is that does not end."""
        frames = re.findall(
            r'File ".*/(.+?)", line \d+ in (.+)', (self.folder / STACKS).read_text()
        )
        where = ", ".join(f"{file}:{function}" for file, function in frames[:4])
        return Outcome(WAITS, f"no end after {self.part.limit_s:.0f} s", where)

    def end(self) -> int | None:
        self.process.join(0.5)
        self.process.kill()
        self.process.join()
        self.connection.close()
        return self.process.exitcode


def run_part(
    part: Part,
    numbers: Iterable[int],
    seed: int,
    folder: Path,
    workers: int,
    note: Callable[[int, Outcome], None],
) -> None:
    """Run cases of a part; `note` gets each outcome as it comes."""
    left = iter(numbers)
    crew: list[_Worker | None] = [
        _Worker(part, seed, folder / f"worker{i}") for i in range(workers)
    ]
    while any(crew):
        wait([worker.connection for worker in crew if worker is not None], timeout=1.0)
        for i, worker in enumerate(crew):
            if worker is None:
                continue
            outcome, dead = None, False
            try:
                if worker.connection.poll():
                    message = worker.connection.recv()
                    if message is not None:
                        outcome = message[1]
                elif worker.late():
                    dead, outcome = True, worker.waiting()
                else:
                    continue
            except (EOFError, ConnectionResetError):
                dead = True
                outcome = Outcome(DIED, f"the process ended with exit code {worker.end()}")
            if not worker.ready and dead:
                raise RuntimeError(f"{part.name} could not be prepared: {outcome}")
            if outcome is not None:
                note(worker.number, outcome)
            worker.ready = True
            number = next(left, None)
            if dead:
                worker.end()
                crew[i] = None
                if number is not None:
                    # one more is prepared, and the case waits for it
                    worker = crew[i] = _Worker(part, seed, folder / f"worker{i}")
                    worker.connection.recv()
                    worker.ready = True
            if number is None:
                if crew[i] is not None:
                    worker.give(None)
                    worker.end()
                    crew[i] = None
            else:
                worker.give(number)


# ------------------------------------------------------------------------------------------ results


class Journal:
    """The outcomes so far, in a file that they are appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, dict[int, Outcome]] = {}
        self.seconds: Counter[str] = Counter()
        for line in path.read_text().splitlines() if path.is_file() else []:
            entry = json.loads(line)
            if "seconds" in entry:
                self.seconds[entry["part"]] += entry["seconds"]
            else:
                part, number = entry.pop("part"), entry.pop("number")
                self.outcomes.setdefault(part, {})[number] = Outcome(**entry)

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def note(self, part: str, number: int, outcome: Outcome) -> None:
        self.outcomes.setdefault(part, {})[number] = outcome
        said = "" if outcome.kind == RIGHT and "soak" not in part else outcome.said
        self._append(
            {
                "part": part,
                "number": number,
                "kind": outcome.kind,
                "said": said,
                "where": outcome.where,
            }
        )

    def took(self, part: str, seconds: float) -> None:
        self.seconds[part] += seconds
        self._append({"part": part, "seconds": seconds})

    def rows(self) -> dict[str, dict[str, Any]]:
        """Per part: tried, right, faults by class, seconds."""
        rows = {}
        for part, outcomes in self.outcomes.items():
            kinds = Counter(outcome.kind for outcome in outcomes.values())
            rows[part] = {
                "tried": len(outcomes),
                "right": kinds.pop(RIGHT, 0),
                "faults": dict(kinds),
                "seconds": round(self.seconds[part], 1),
            }
        return rows

    def kinds(self) -> list[dict[str, Any]]:
        """The different faults, the most frequent first, with the numbers of a few cases."""
        found: dict[tuple[str, str, str], list[tuple[int, Outcome]]] = {}
        for part, outcomes in self.outcomes.items():
            for number, outcome in sorted(outcomes.items()):
                if outcome.kind != RIGHT:
                    found.setdefault((part, outcome.kind, outcome.where), []).append(
                        (number, outcome)
                    )
        return [
            {
                "part": part,
                "class": kind,
                "where": short(where),
                "count": len(cases),
                "cases": {number: short(outcome.said) for number, outcome in cases[:EXAMPLES]},
            }
            for (part, kind, where), cases in sorted(found.items(), key=lambda f: -len(f[1]))
        ]


def short(said: str) -> str:
    """Without the folders of this machine."""
    return re.sub(r"(?<![\w.])/(?:[^\s'\"/:]+/)+", "", said)


def table(rows: dict[str, dict[str, Any]]) -> str:
    from record import markdown

    seen = [kind for kind in CLASSES if any(kind in row["faults"] for row in rows.values())]
    lines = [["part", "tried", "right", *seen]]
    for part, row in rows.items():
        counts = [str(row["faults"].get(kind, 0)) for kind in seen]
        lines.append([part, str(row["tried"]), str(row["right"]), *counts])
    return markdown(lines)


def campaign(
    wanted: Sequence[tuple[Part, int]],
    seed: int,
    folder: Path,
    journal: Journal,
    workers: int = WORKERS,
) -> None:
    """Run the first so many cases of each part that the journal does not have yet."""
    for part, count in wanted:
        done = journal.outcomes.get(part.name, {})
        numbers = [number for number in range(count) if number not in done]
        if not numbers:
            continue
        start = time.monotonic()
        run_part(
            part,
            numbers,
            seed,
            folder,
            min(workers, len(numbers)),
            lambda number, outcome, part=part: journal.note(part.name, number, outcome),
        )
        journal.took(part.name, time.monotonic() - start)
        print(f"{part.name}: {journal.rows()[part.name]}", file=sys.stderr, flush=True)


def commit_of(root: Path) -> dict[str, Any]:
    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
    }


def again(name: str, number: int, seed: int) -> int:
    """One case in this process, with all it prints."""
    import hostile_inputs

    hostile_inputs.VERBOSE = True
    part = next(part for part in parts() if part.name == name)
    with tempfile.TemporaryDirectory() as folder:
        prepared, own = Path(folder) / "prepared", Path(folder) / "case"
        prepared.mkdir()
        own.mkdir()
        outcome = part.prepare(prepared)(drawn(seed, name, number), own)
    print(outcome)
    return 0 if outcome.kind == RIGHT else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Odd inputs and faults, counted by class.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout that is tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of every part")
    parser.add_argument(
        "--part",
        action="append",
        metavar="PART[:CASES]",
        help="only this one, or the first so many cases of it; may be repeated",
    )
    parser.add_argument("--only", metavar="PART:NUMBER", help="one case, in this process")
    parser.add_argument("--work", type=Path, help="folder of the journal, to go on with later")
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "campaign.json")
    args = parser.parse_args(argv)
    root = args.root.resolve()
    if os.environ.get(_INSIDE) != str(root):  # in a process that finds the modules of that checkout
        places = [root, root / "launch", BENCHMARKS, ROOT / "tests"]
        own = {
            _INSIDE: str(root),
            "PYTHONPATH": os.pathsep.join(map(str, places)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        words = sys.argv[1:] if argv is None else list(argv)
        return subprocess.run(
            [sys.executable, "-W", "ignore", __file__, *words], env=os.environ | own
        ).returncode
    from record import environment, write

    import pylo_dist

    if not Path(pylo_dist.__file__).is_relative_to(root):
        raise RuntimeError(f"pylo_dist is {pylo_dist.__file__}, which is not below {root}")
    if args.only:
        name, number = args.only.split(":")
        return again(name, int(number), args.seed)
    found = environment() | commit_of(root)
    with tempfile.TemporaryDirectory(prefix="campaign") as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        journal = Journal(work / "journal.jsonl")
        asked = dict(word.partition(":")[::2] for word in args.part or ())
        wanted = [
            (part, int(asked.get(part.name) or max(1, round(part.cases * args.share))))
            for part in parts()
            if not asked or part.name in asked
        ]
        campaign(wanted, args.seed, Path(scratch), journal, args.workers)
    rows = journal.rows()
    result = {
        "what": "odd inputs and faults: how many were tried, how many came out right, and what the "
        "others are; a case is had again by --only PART:NUMBER with the same seed",
        **found,
        "settings": {"seed": args.seed, "share": args.share},
        "parts": rows,
        "soaks": [
            outcome.said
            for part, outcomes in journal.outcomes.items()
            for outcome in outcomes.values()
            if "soak" in part
        ],
        "kinds_of_faults": journal.kinds(),
    }
    write(result, args.out)
    print(table(rows))
    return 1 if any(row["faults"] for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

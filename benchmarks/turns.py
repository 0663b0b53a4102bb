"""Two checkouts side by side: processes of both are alive at once and work in turns, so that a busy
machine slows both alike. Starts processes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import record
from record import ROOT, markdown

Case = TypeVar("Case", bound=Sequence[str])  # the words by which it is chosen


def environment(*folders: Path) -> dict[str, str]:
    """Of a process that imports from these folders first, and computes on one thread."""
    path = os.pathsep.join(map(str, folders))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


class Build:
    """The processes of one checkout for one case: `script --worker CASE...`, once per rank. Each
    says "ready", and answers every line of its input with a line.

    Args:
        root: the checkout that `import pylo_dist` finds; the script is that of this one.
        port: of the ranks' meeting.
    """

    def __init__(
        self, root: Path, script: Path, case: Sequence[str], ranks: int, port: int
    ) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(script), "--worker", *case],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment(root, ROOT / "benchmarks", ROOT / "tests")
                | {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                },
            )
            for rank in range(ranks)
        ]

    def answers(self) -> list[str]:
        """A line of every rank.

        Raises:
            RuntimeError: if one has ended.
        """
        lines = [process.stdout.readline().strip() for process in self.processes if process.stdout]
        if not all(lines):
            raise RuntimeError("a process of the benchmark has ended; its error is above")
        return lines

    def ask(self, line: str) -> list[str]:
        """What every rank answers to this line."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
        return self.answers()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@contextmanager
def both_builds(
    other: Path, script: Path, case: Sequence[str], ranks: int = 1
) -> Iterator[list[Build]]:
    """This checkout and the other one, ready; ended after that."""
    builds: list[Build] = []
    try:
        for i, root in enumerate((ROOT, other)):
            builds.append(Build(root, script, case, ranks, 29600 + i))
        for build in builds:
            build.answers()
        yield builds
    finally:
        for build in builds:
            build.end()


def in_turns(turns: int) -> Iterator[int]:
    """0 and 1, the order alternating."""
    for turn in range(turns):
        yield from (0, 1) if turn % 2 else (1, 0)


def commit_of(root: Path) -> str:
    return subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()


# ------------------------------------------------------------------------------- the command line


def command_line(description: str, turns: int, out: Path) -> argparse.ArgumentParser:
    """What every benchmark of two builds is told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--other", type=Path, help="the other checkout, its compiled passes built")
    parser.add_argument("--turns", type=int, default=turns)
    parser.add_argument("--cases", help='only those whose words hold this, as in "zero1"')
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    return parser


def parsed(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    worker: Callable[[str, str, str], None],
) -> argparse.Namespace | None:
    """The arguments; None for a process of a case, which has done its work then."""
    args = parser.parse_args(argv)
    if args.worker:
        worker(*args.worker)
        return None
    return checked(parser, args)


def checked(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, with the other checkout as a whole path; ends the process where none is."""
    if args.other is None or not (args.other / "pylo_dist").is_dir():
        parser.error(f"--other must be a checkout of pylo_dist, not {args.other}")
    args.other = args.other.resolve()
    return args


def write(
    what: str,
    args: argparse.Namespace,
    settings: dict[str, Any],
    cases: Sequence[Case],
    measured: Callable[[Case], list[dict[str, Any]]],
    shown: str,
) -> dict[str, Any]:
    """Measure the cases that are chosen, write the JSON and print a table of its rows, numbers
    formatted as `shown`.
    """
    result = {
        "what": what,
        **record.environment(),
        "other_commit": commit_of(args.other),
        "settings": settings,
        "rows": [
            row
            for case in cases
            if not args.cases or args.cases in " ".join(case)
            for row in measured(case)
        ],
    }
    record.write(result, args.out)
    columns = list(result["rows"][0])
    lines = [
        [format(row[c], shown) if isinstance(row[c], float) else str(row[c]) for c in columns]
        for row in result["rows"]
    ]
    print(markdown([columns, *lines]))
    return result

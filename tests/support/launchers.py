"""Starting runs of launch/gpt2.py under another launcher, and waiting for what they write."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest


def mpirun(ranks: int) -> list[str]:
    """The words that start them. Skips where this machine has no MPI; fails where tests/run.sh
    could have set it up.
    """
    if shutil.which("mpirun") is None or find_spec("mpi4py") is None:
        reason = "no mpirun, or no mpi4py: launch/system.sh, launch/setup.sh launch,dev,mpi"
        if shutil.which("mpirun") is not None and "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    return [
        "mpirun",
        *(["--allow-run-as-root"] if os.geteuid() == 0 else []),
        "--oversubscribe",
        "-np",
        str(ranks),
    ]


def wait_for_rows(out: Path, count: int) -> None:
    path = out / "metrics.jsonl"
    wait_for(lambda: path.is_file() and path.read_text().count("\n") >= count)


def wait_for(holds: Callable[[], bool], limit_s: float = 120) -> None:
    end = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"not so after {limit_s} s")
        time.sleep(0.02)

"""What every benchmark's JSON holds beside its figures: hardware, versions, commit, load. Writes
the file it is given.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
REQUIRED = ("what", "hardware", "versions", "commit")  # of every JSON in RESULTS


def environment() -> dict[str, Any]:
    """Hardware, versions, commit and load. Taken before the runs: it is the commit that was
    measured.
    """
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next(
            (
                x.split(":", 1)[1].strip()
                for x in info.read_text().splitlines()
                if x.startswith("model name")
            ),
            cpu,
        )
    hardware: dict[str, Any] = {"cpu": cpu, "cores": os.cpu_count()}
    if torch.cuda.is_available():
        hardware["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False
        ).stdout.strip()

    load = os.getloadavg()[0]
    return {
        "hardware": hardware,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "load_average_before": round(load, 2),
        "machine_was_shared": load > 1.0,
    }


def write(result: dict[str, Any], out: Path) -> None:
    """Write a JSON, whole or not at all; it must say what it is and where it was measured."""
    missing = [key for key in REQUIRED if key not in result]
    if missing:
        raise ValueError(f"{out}: a result needs {', '.join(missing)}; see benchmarks/record.py")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f"{out.name}.part")
    aside.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(aside, out)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table; the first line is its head."""
    head, *body = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])

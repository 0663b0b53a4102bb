"""benchmarks/gpu_check.sh without a GPU: an interpreter and tools that do nothing stand in for
those of such a machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = ("gpu_check.sh", "gpu_summary.py", "record.py")
PYTHON = """#!/usr/bin/env bash
case "$*" in
*gpu_summary.py*) [ -n "${SUMMARY:-}" ] && exec "$SUMMARY" "$@" ;;
*get_device_capability*) echo 90 ;;
*get_device_name*) echo "NVIDIA Stand-in" ;;
*setup.py*) touch pylo_dist/_kernels_cpu.so ;;
*bench_step.py*)
  echo '{"lists": {"tiny": {"ns_per_parameter": {"VeLO": {"ms": 1.5}}}}}' >"${@: -1}"
  ;;
*"gpu_kernels.py kernels") echo '{"small_fc": {"ms in all": 2.5, "launches of the passes": 6}}' ;;
*"gpu_kernels.py graph") echo '{"small_fc": {"launched, ms": 3.5, "replayed, ms": 0.5}}' ;;
*"-k real_ranks") head -c 400000 /dev/zero | tr '\\0' x; sleep "${RANKS_TAKE:-0}" ;;
esac
exit 0
"""
TOOLS = {
    "nvidia-smi": "echo 'NVIDIA Stand-in'",
    "nvcc": "true",
    "compute-sanitizer": "echo 'no permission'; exit 1",
    "ncu": "true",
}
PARTS = ["device", "build", "doctor", "tests_gpu", "step", "kernels", "graph", "parity", "profile"]
LATE = {"ranks", "sanitizer", "tests_cpu"}


def check(folder: Path, most: int = 560, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs it in a tree of its own, where it has `most` seconds."""
    (folder / "benchmarks/results").mkdir(parents=True)
    (folder / "bin").mkdir()
    for name in NEEDED:
        shutil.copy(ROOT / "benchmarks" / name, folder / "benchmarks")
    script = folder / "benchmarks/gpu_check.sh"
    text = script.read_text()
    assert text.count("most=560 ") == 1
    script.write_text(text.replace("most=560 ", f"most={most} "))
    for name in ("setup.py", "csrc", "pylo_dist"):
        (folder / name).mkdir() if "." not in name else (folder / name).touch()
    for name, does in {**TOOLS, "python": PYTHON}.items():
        tool = folder / "bin" / name
        tool.write_text(does if name == "python" else f"#!/bin/sh\n{does}\n")
        tool.chmod(0o755)
    return subprocess.run(
        [script, "--out", folder / "out"],
        env={
            **{k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "PYLO_DIR")},
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": str(folder / "bin/python"),
            **environment,
        },
        capture_output=True,
        text=True,
    )


def test_every_part_is_reached_and_packed(tmp_path: Path) -> None:
    done = check(tmp_path, SUMMARY=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = (tmp_path / "out").iterdir()
    assert archive.name.startswith("gpu_check_NVIDIA_Stand_in_torch")
    assert archive.stat().st_size < 1e6
    (results,) = (tmp_path / "benchmarks/results").iterdir()
    with tarfile.open(archive) as tar:
        sizes = {entry.name: entry.size for entry in tar}
        packed = tar.extractfile(results.name)
        assert packed is not None
        result = json.loads(packed.read())
    assert sizes["ranks.log"] == 200_000  # its end
    parts = result["parts"]
    assert [name for name in parts if name not in LATE] == PARTS
    assert parts.keys() >= LATE
    said = {name: part["result"] for name, part in parts.items() if part["result"] != "ok"}
    assert said.keys() == {"parity", "sanitizer"}
    assert said["parity"] == "not run: PYLO_DIR names no folder"
    assert "cannot watch this device" in said["sanitizer"]
    assert {f"{name}.log" for name in parts if name != "parity"} <= sizes.keys()
    assert all(0 <= x["began"] <= x["began"] + x["seconds"] <= 560 for x in parts.values())
    assert result["seconds"] >= max(x["began"] + x["seconds"] for x in parts.values())
    assert [result[x]["small_fc"] != {} for x in ("kernels", "graph")] == [True, True]
    for figure in ("2.5 ms a step", "3.5 ms launched", "VeLO 1.5"):
        assert figure in done.stdout


def test_what_has_no_time_left_was_not_run(tmp_path: Path) -> None:
    """Ranks would take a minute, and get what is left of 17 s but for those of the summary."""
    done = check(tmp_path, 17, RANKS_TAKE="60")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "runs/gpu_check/parts.tsv").read_text().splitlines()
    said = {line.split("\t")[0]: line.split("\t")[1] for line in lines}
    late = {"ranks", "sanitizer_memcheck", "sanitizer_racecheck"}
    assert said.keys() == {*PARTS, *late, "tests_cpu"}
    assert all(said[name].startswith("not run") for name in late)
    assert all(x == "ok" or x.startswith("not run") for x in said.values())


def test_other_arguments_are_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "benchmarks/gpu_check.sh", "--outt", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--out FOLDER" in done.stderr

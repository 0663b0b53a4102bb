"""The end of gpu_check.sh: its table, its results file, and one archive of both and all logs. Reads
the folder of logs; writes benchmarks/results and the archive's folder.

    python benchmarks/gpu_summary.py LOGS SECONDS FOLDER DEVICE     exits with 1 if a part failed

DEVICE is the GPU's name; without one, "", there is only the table.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import record
import torch

MOST_OF_A_LOG = 200_000  # bytes at its end: the archive stays small whatever is printed


def parts_of(logs: Path) -> dict[str, dict[str, Any]]:
    """Every part, in the order in which they ended, with when it began; seconds."""
    rows = [line.split("\t") for line in (logs / "parts.tsv").read_text().splitlines()]
    return {
        name: {"result": said, "began": int(began), "seconds": int(took)}
        for name, said, began, took in rows
    }


def collect(logs: Path, seconds: int, device: str) -> dict[str, Any]:
    """What goes into the results file."""
    result = {
        "seconds": seconds,
        "parts": parts_of(logs),
        "torch": torch.__version__,
        "device": device or None,
        **record.environment(),
    }
    for name in ("kernels", "graph", "parity"):
        log = logs / f"{name}.log"
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        found = [line for line in lines if line.startswith("{")]
        if found:
            result[name] = json.loads(found[-1])
    if (logs / "step.json").is_file():
        result["step"] = json.loads((logs / "step.json").read_text())
    return result


def report(result: dict[str, Any]) -> str:
    width = max(map(len, result["parts"]))
    lines = [
        f"{name:<{width}}  {part['result']}  {part['seconds']} s"
        for name, part in result["parts"].items()
    ]
    for case, row in result.get("kernels", {}).items():
        launches = row["launches of the passes"]
        lines.append(f"{case:<{width}}  {row['ms in all']} ms a step, {launches:g} launches")
    for case, row in result.get("graph", {}).items():
        launched, replayed = row["launched, ms"], row["replayed, ms"]
        lines.append(f"graph {case}: {launched} ms launched, {replayed} ms replayed")
    for model, entry in result.get("step", {}).get("lists", {}).items():
        rows = {name: row.get("ms") for name, row in entry.get("ns_per_parameter", {}).items()}
        lines.append(f"{model}, ms: " + ", ".join(f"{name} {ms}" for name, ms in rows.items()))
    lines += [f"{case}: {figure}" for case, figure in result.get("parity", {}).items()]
    return "\n".join(lines)


def pack(logs: Path, out: Path, results: Path) -> Path:
    """One archive of the results file and the ends of all logs."""
    out.mkdir(parents=True, exist_ok=True)
    archive = out / f"{results.stem.replace('gpu_', 'gpu_check_', 1)}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path in [results, *sorted(path for path in logs.iterdir() if path.is_file())]:
            content = path.read_bytes()
            content = content if path == results else content[-MOST_OF_A_LOG:]
            entry = tarfile.TarInfo(path.name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive


def main(arguments: list[str]) -> int:
    logs, seconds, out, name = Path(arguments[0]), int(arguments[1]), *arguments[2:]
    result = collect(logs, seconds, name)
    print(report(result))
    if result["device"] is None:
        print(f"{seconds} s in all")
    else:
        device, version = (
            "".join(c if c.isalnum() else "_" for c in result[key]) for key in ("device", "torch")
        )
        results = Path("benchmarks/results") / f"gpu_{device}_torch{version}.json"
        results.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{seconds} s in all, {results}, {pack(logs, Path(out), results)}")
    said = [part["result"] for part in result["parts"].values()]
    return any(not x.startswith(("ok", "not run")) for x in said)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

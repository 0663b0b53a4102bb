"""Save and load throughput of checkpoints beside torch.distributed.checkpoint alone; write
results/checkpoint.json and print a table.

    python benchmarks/bench_checkpoint.py           # 405 MB on one rank, a disk and /dev/shm
    python benchmarks/bench_checkpoint.py --quick

The state is an AdafacLO's of GPT blocks. Ours is `checkpoint.save` and `checkpoint.load`, which
compares all before anything changes; the other way is `dcp.save` of the same state dict, and
`dcp.load` straight into the live state. All four take turns within one process, in an order that
turns with them, after one turn that does not count. Figures are MB (of files, 10^6 bytes) per
second of CPU, user and system together, since a shared machine lets all of them wait alike; of a
row the median.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch
import torch.distributed.checkpoint as dcp
from record import markdown

import pylo_dist
from pylo_dist import checkpoint
from pylo_dist.checkpoint.files import DIGESTS
from pylo_dist.checkpoint.manifest import Manifest

MB = 1e6
SHM = Path("/dev/shm")


def optimizer_of(width: int, layers: int) -> pylo_dist.AdafacLO:
    """With the state of one step."""
    block = [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    torch.manual_seed(0)
    named = [
        (f"p{i}", torch.nn.Parameter(0.02 * torch.randn(shape)))
        for i, shape in enumerate(block * layers)
    ]
    for _, param in named:
        param.grad = 0.01 * torch.randn_like(param)
    optimizer = pylo_dist.AdafacLO(named, weights="demo")
    optimizer.step()
    return optimizer


def cpu_seconds(action: Callable[[], Any]) -> float:
    begin = time.process_time()
    action()
    return time.process_time() - begin


def measured(place: Path, optimizer: torch.optim.Optimizer, turns: int) -> dict[str, Any]:
    """One row: MB per CPU second of the four, and the ratios ours / torch's."""
    folder = Path(tempfile.mkdtemp(dir=place))
    own, raw = folder / "own", folder / "raw"

    def dcp_load() -> None:
        dcp.load({"optimizer": optimizer.state_dict()}, checkpoint_id=raw, no_dist=True)

    def dcp_save() -> None:
        dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=raw, no_dist=True)

    actions: dict[str, Callable[[], Any]] = {
        "save": lambda: checkpoint.save(own, {"optimizer": optimizer}),
        "dcp_save": dcp_save,
        "load": lambda: checkpoint.load(own, {"optimizer": optimizer}),
        "dcp_load": dcp_load,
    }
    spent: dict[str, list[float]] = {name: [] for name in actions}
    try:
        for turn in range(turns + 1):
            for pair in (("save", "dcp_save"), ("load", "dcp_load")):
                for name in pair if turn % 2 else pair[::-1]:
                    seconds = cpu_seconds(actions[name])
                    if turn:
                        spent[name].append(seconds)
            size = sum(path.stat().st_size for path in own.iterdir()) / MB
            digest = next(iter(Manifest.read(own).files.values())).algorithm
            shutil.rmtree(own)
            shutil.rmtree(raw)
            os.sync()  # or the next turn pays for what this one left to the kernel
    finally:
        shutil.rmtree(folder)
    rates = {name: size / median(seconds) for name, seconds in spent.items()}
    return {
        "megabytes": round(size, 1),
        "digest": digest,
        **{f"{name}_mb_per_cpu_s": round(rate, 1) for name, rate in rates.items()},
        "save_ratio": round(rates["save"] / rates["dcp_save"], 3),
        "load_ratio": round(rates["load"] / rates["dcp_load"], 3),
        "cpu_seconds": {name: [round(x, 4) for x in seconds] for name, seconds in spent.items()},
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Checkpoints beside torch's own, MB per CPU s.")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--quick", action="store_true", help="3 turns, 2 layers")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "checkpoint.json")
    args = parser.parse_args(argv)
    if args.quick:
        args.turns, args.layers = 3, 2
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*assuming the intent is to")
    found = record.environment()
    found["versions"]["blake3"] = version("blake3") if "blake3" in DIGESTS else None
    optimizer = optimizer_of(args.width, args.layers)
    places = {"disk": args.disk} | ({"/dev/shm": SHM} if SHM.is_dir() else {})
    result = {
        "what": "checkpoints of an AdafacLO's state on one rank, MB of files per CPU second: "
        "pylo_dist.checkpoint and torch.distributed.checkpoint alone, in turns within one run, "
        "medians",
        **found,
        "quick": args.quick,
        "settings": {"turns": args.turns, "width": args.width, "layers": args.layers},
        "rows": [
            {"place": name, **measured(place, optimizer, args.turns)}
            for name, place in places.items()
        ],
    }
    record.write(result, args.out)
    columns = ("place", "save_mb_per_cpu_s", "dcp_save_mb_per_cpu_s", "save_ratio")
    columns += ("load_mb_per_cpu_s", "dcp_load_mb_per_cpu_s", "load_ratio")
    print(markdown([columns, *([str(row[c]) for c in columns] for row in result["rows"])]))
    return result


if __name__ == "__main__":
    main()

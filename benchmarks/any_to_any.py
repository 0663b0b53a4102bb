"""Load the checkpoint of every layout in every layout; write results/any_to_any.json and print the
README's table.

Layouts: plain, DDP, ZeRO and FSDP2 on 1, 2, 3, 4 and 8 gloo processes, HSDP in two copies on 2, 4
and 8; rules: AdafacLO, VeLO, CELO2. Each trains 3 steps, saves through torch.distributed.checkpoint
and goes on for 5. Every other one loads that, compares the gathered state with the saved one to the
bit, goes on for 5 steps on the same gradients, and compares its parameters. What runs is in
tests/support/layouts.py; the suite runs it on a sample of the pairs. Rules may be run one after the
other: those that --out has of the same commit are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from bench_demo import environment, markdown

from support.layouts import LEARNED, MORE, STEPS, WORLD, all_layouts, load_one, new_groups, save_all
from support.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "any_to_any.json"
TITLES = {
    "plain": "plain",
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "fsdp2": "FSDP2",
    "hsdp": "HSDP",
}


def matrix(rank: int, world: int, folder: str, kinds: list[str]) -> list[dict[str, Any]]:
    """Every pair that fits into the world, on real processes; the rows are the first rank's."""
    groups, layouts, rows = (
        new_groups(),
        [layout for layout in all_layouts() if layout.ranks <= world],
        [],
    )
    for kind in kinds:
        truths = {source: save_all(source, kind, groups, folder) for source in layouts}
        for source in layouts:
            for target in layouts:
                row: dict[str, Any] = {
                    "rule": kind,
                    "saved": str(source),
                    "loaded": str(target),
                    "bit_equal": True,
                }
                try:
                    row["of_tolerance"] = load_one(
                        source, target, kind, groups, folder, truths[source]
                    )
                except AssertionError as error:  # of the first rank, after the last collective
                    row |= {"bit_equal": False, "of_tolerance": None, "error": str(error)}
                rows.append(row)
            if rank == 0:
                print(
                    f"{kind}: {source} loaded in {len(layouts)} layouts",
                    file=sys.stderr,
                    flush=True,
                )
            dist.barrier(groups[world])
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Per kind of layout: loads that were equal to the bit of all, and the worst parameter after
    the further steps.
    """
    names = list(dict.fromkeys(layout.name for layout in all_layouts()))
    lines = [["saved by \\ loaded by", *(TITLES[name] for name in names)]]
    for source in names:
        cells = []
        for target in names:
            own = [
                row
                for row in rows
                if (kind_of(row["saved"]), kind_of(row["loaded"])) == (source, target)
            ]
            equal = [row for row in own if row["bit_equal"]]
            worst = max((row["of_tolerance"] for row in equal), default=float("nan"))
            cells.append(f"{len(equal)} of {len(own)}, {worst:.2g}")
        lines.append([TITLES[source], *cells])
    return markdown(lines)


def kind_of(layout: str) -> str:
    return layout.split("@")[0]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Load every layout's checkpoint in every layout; about twenty minutes on two "
        "cores."
    )
    parser.add_argument("--rules", nargs="+", default=list(LEARNED), choices=LEARNED)
    parser.add_argument("--quick", action="store_true", help="AdafacLO on 1 and 2 ranks")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    found, start = environment(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            args.rules = LEARNED[:1]
        world = 2 if args.quick else WORLD
        rows = run_ranks(world, matrix, folder, list(args.rules))[0]
    layouts = [layout for layout in all_layouts() if layout.ranks <= world]
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    if before.get("commit") == found["commit"] and before["settings"]["layouts"] == list(
        map(str, layouts)
    ):
        rows = [row for row in before["rows"] if row["rule"] not in args.rules] + rows
        start -= before["seconds"]
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    result = {
        "what": "state after a load equal to the saved one to the bit, and parameters after "
        "further steps in units of the layout tolerance (1 is the limit)",
        **found,
        "settings": {
            "quick": args.quick,
            "rules": rules,
            "layouts": list(map(str, layouts)),
            "steps_before": STEPS,
            "steps_after": MORE,
        },
        "seconds": round(time.perf_counter() - start),
        "loads": len(rows),
        "bit_equal": sum(row["bit_equal"] for row in rows),
        "worst_of_tolerance": max(
            (row["of_tolerance"] for row in rows if row["bit_equal"]), default=None
        ),
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))
    worst = result["worst_of_tolerance"]
    print(
        f"\n{result['bit_equal']} of {len(rows)} loads bit-equal, then {worst:.2g} of the layout "
        "tolerance at most"
    )
    return 0 if result["bit_equal"] == len(rows) and result["worst_of_tolerance"] <= 1.0 else 1


if __name__ == "__main__":
    sys.exit(main())

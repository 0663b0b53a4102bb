"""Model step time and bytes on many ranks, check the model on the ranks that are here, predict;
write results/scaling.json.

    python benchmarks/scaling.py                              # parts and check on 1, 2 and 4 gloo
                                                              # ranks
    python benchmarks/scaling.py --parts train.json           # predictions from the parts that
                                                              # bench_train.py measured on a GPU

The model is in step_model.py. What is measured, what is assumed (networks and GPUs, with their
sources) and what is predicted stand apart in the file. Ranks that share this machine's cores slow
each other down: the check multiplies what computes by ranks over cores where that is above 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from bench_memory import memory_formula, shapes_of
from bench_zero import MINI, Clock
from presets import PRESETS
from record import RESULTS, environment, markdown, write
from step_model import FEATURES, NETWORKS, Link, Network, Parts, fit, step_times, zero_bytes
from trainees import TINY, Stopwatch, Trainee, device_of, on_ranks

from pylo_dist import comm
from pylo_dist.core import trace

CONFIGS = {"tiny": TINY, "mini": MINI}
GOAL, GOAL_RANKS = 0.97, 8  # of AdamW's tokens per second, see bench_train.py


# -------------------------------------------------------------------------------------------- check


@dataclass(frozen=True, slots=True)
class Settings:
    """What all ranks must know."""

    preset: str
    tokens: int
    rounds: int
    steps: int
    bucket_cap_mb: float
    optimizers: tuple[str, ...] = ("AdafacLO", "VeLO", "AdamW")
    # bytes of the collectives that are timed alone
    sizes: tuple[int, ...] = (1 << 12, 1 << 16, 1 << 20, 1 << 22)


def measure_rank(rank: int, world: int, settings: Settings) -> dict[str, Any]:
    """Steps and their bytes on these ranks, collectives alone, and on one rank the parts."""
    device, config = device_of(rank), CONFIGS[settings.preset]
    watch, clock = Stopwatch(device), Clock()
    length = min(settings.tokens, config.block_size)
    trainees = [
        Trainee("zero1", name, config, bucket_cap_mb=settings.bucket_cap_mb, device=device)
        for name in settings.optimizers
    ]
    found: dict[str, Any] = {"steps": {}, "payload": {}, "alone": {}, "compute": [], "plain": {}}
    found["steps"] = {name: [] for name in settings.optimizers}
    for _ in range(settings.rounds):
        for name, trainee in zip(settings.optimizers, trainees, strict=True):
            idx = trainee.tokens(settings.tokens // length, length)
            trainee.train(idx)
            dist.barrier()
            for _ in range(settings.steps):
                clock.start()
                watch.start()
                with trace.observe(clock):
                    trainee.train(idx)
                found["steps"][name].append(watch.stop()[0])
                found["payload"][name] = dict(clock.payload)
            trainee.settle()
        if world == 1:
            _measure_parts(found, trainees, settings, watch, length)
    if world > 1:
        found["alone"] = {
            size: _collectives_alone(size, world, device, watch) for size in settings.sizes
        }
    found["device"], found["backend"] = str(device), dist.get_backend()
    del trainees, trainee
    gc.collect()
    return found


def _measure_parts(
    found: dict[str, Any],
    trainees: Sequence[Trainee],
    settings: Settings,
    watch: Stopwatch,
    length: int,
) -> None:
    """Forward with backward, and the steps of plain optimizers; in turns with everything else."""
    first = trainees[0]
    plain = Trainee("plain", "AdamW", first.config, bucket_cap_mb=1.0, device=first.device)
    idx = plain.tokens(settings.tokens // length, length)
    for _ in range(settings.steps + 1):
        plain.model.zero_grad()
        watch.start()
        plain.backward(plain.forward(idx))
        found["compute"].append(watch.stop()[0])
    for name in settings.optimizers:
        own = Trainee("plain", name, first.config, bucket_cap_mb=1.0, device=first.device)
        for _ in range(settings.steps + 1):
            loss = own.forward(idx)
            own.backward(loss)
            watch.start()
            own.step(loss)
            found["plain"].setdefault(name, []).append(watch.stop()[0])


def _collectives_alone(
    size: int, world: int, device: torch.device, watch: Stopwatch, repeats: int = 7
) -> dict[str, float]:
    """Median seconds of a reduce-scatter, an all-gather and an all-reduce over `size` bytes,
    nothing else going on.
    """
    full = torch.ones(max(1, size // 4 // world) * world, device=device)
    shard, group = torch.ones(full.numel() // world, device=device), dist.group.WORLD
    calls = {
        "reduce_scatter": lambda: comm.reduce_scatter(shard, full, group, "a reduce-scatter alone"),
        "all_gather": lambda: comm.all_gather(full, shard, group, "an all-gather alone"),
        "all_reduce": lambda: comm.all_reduce(full, group, "an all-reduce alone"),
    }
    seconds = {}
    for name, call in calls.items():
        taken = []
        for _ in range(repeats):
            dist.barrier()
            watch.start()
            call().wait()
            taken.append(watch.stop()[0])
        seconds[name] = median(taken)
    return seconds


def network_here(per_rank: Sequence[dict[str, Any]], world: int) -> tuple[Network, dict[str, Any]]:
    """The loopback of this machine as a Network, from the collectives timed alone on `world`
    ranks.
    """
    rings, trees = [], []
    for size in per_rank[0]["alone"]:
        slowest = {
            name: max(r["alone"][size][name] for r in per_rank)
            for name in per_rank[0]["alone"][size]
        }
        rings.append(
            (size * (world - 1) / world, (slowest["reduce_scatter"] + slowest["all_gather"]) / 2)
        )
        trees.append((2.0 * size, slowest["all_reduce"]))
    start, per_byte = fit(rings)
    hop = max(0.0, fit(trees)[0] - start) / (2 * (world - 1))
    link = Link(latency=hop, bandwidth=1.0 / max(per_byte, 1e-15))
    network = Network(
        "this machine", world, max(0.0, start - (world - 1) * hop), link, link, "measured here"
    )
    return network, {"ring_bytes_and_seconds": rings, "tree_bytes_and_seconds": trees}


def parts_here(alone: dict[str, Any], settings: Settings, numel: int) -> dict[str, Parts]:
    """Parts by optimizer from the run on one rank; `rest` is what its ZeroOptimizer step takes
    beside.
    """
    token_s = median(alone["compute"]) / settings.tokens
    found = {}
    for name in settings.optimizers:
        step_s = median(alone["plain"][name][1:]) / numel
        rest = median(alone["steps"][name]) - settings.tokens * token_s - numel * step_s
        found[name] = Parts(token_s, {name: step_s}, max(0.0, rest), "measured on one rank here")
    return found


def check(runs: Sequence[tuple[int, list[dict[str, Any]]]], settings: Settings) -> dict[str, Any]:
    """Model against measurement on the ranks of this machine: seconds and bytes."""
    shapes, cores = shapes_of(CONFIGS[settings.preset]), os.cpu_count() or 1
    numel = sum(math.prod(shape) for shape in shapes.values())
    parts = parts_here(next(per_rank[0] for world, per_rank in runs if world == 1), settings, numel)
    rows, networks = [], {}
    for world, per_rank in runs:
        network, points = (
            network_here(per_rank, world)
            if world > 1
            else (NETWORKS["H200 NVLink + NDR InfiniBand"], {})
        )
        if world > 1:
            networks[str(world)] = {**asdict(network), **points}
        on_cpu = per_rank[0]["device"] == "cpu"
        for name in settings.optimizers:
            slowest = [
                max(steps)
                for steps in zip(*(result["steps"][name] for result in per_rank), strict=True)
            ]
            times = step_times(
                parts[name],
                network,
                shapes,
                name,
                ranks=world,
                tokens=settings.tokens,
                bucket_cap_mb=settings.bucket_cap_mb,
                slowdown=max(1.0, world / cores) if on_cpu else 1.0,
            )
            counted, moved = (
                per_rank[0]["payload"][name],
                zero_bytes(shapes, name, world, settings.bucket_cap_mb),
            )
            measured = median(slowest)
            rows.append(
                {
                    "ranks": world,
                    "optimizer": name,
                    "measured_ms": round(1e3 * measured, 2),
                    "modelled_ms": {
                        "exposed": round(1e3 * times.exposed, 2),
                        "hidden": round(1e3 * times.hidden, 2),
                    },
                    "error_exposed": round(times.exposed / measured - 1, 4),
                    "error_hidden": round(times.hidden / measured - 1, 4),
                    "calibrated": world == 1,
                    "parts_ms": {
                        part: round(1e3 * seconds, 3) for part, seconds in asdict(times).items()
                    },
                    "counted_bytes": counted,
                    "modelled_bytes": {
                        "reduce-scatter": sum(moved.scatters),
                        "all-gather": sum(moved.gathers),
                        "small syncs": sum(moved.small),
                    },
                }
            )
    errors = [abs(row["error_exposed"]) for row in rows if not row["calibrated"]]
    return {
        "what": "steps of ZeroOptimizer, stage 1, on ranks of this machine; one rank is where "
        "'rest' is taken from, so that its error says nothing",
        "cores": cores,
        "rows": rows,
        "networks": networks,
        "largest_error": max(errors, default=None),
        "median_error": median(errors) if errors else None,
        "parts": {name: asdict(part) for name, part in parts.items()},
    }


# -------------------------------------------------------------------------------------- predictions


def exchange_predictions(models: Sequence[str], ranks: Sequence[int]) -> list[dict[str, Any]]:
    """Bytes and seconds of what ranks exchange, which needs no kernel time; AdafacLO and AdamW."""
    rows = []
    for network in NETWORKS.values():
        for model in models:
            shapes = shapes_of(PRESETS[model])
            nothing = Parts(0.0, dict.fromkeys((*FEATURES, "AdamW"), 0.0))
            for world in ranks:
                for optimizer in ("AdafacLO", "VeLO", "AdamW"):
                    moved = zero_bytes(shapes, optimizer, world)
                    times = step_times(nothing, network, shapes, optimizer, ranks=world, tokens=0)
                    memory = (
                        {}
                        if optimizer == "VeLO"
                        else asdict(memory_formula(shapes, optimizer, ranks=world, stage=2))
                    )
                    rows.append(
                        {
                            "predicted": True,
                            "network": network.name,
                            "model": model,
                            "optimizer": optimizer,
                            "ranks": world,
                            "sent_bytes_per_rank": moved.sent(world),
                            "small_bytes": sum(moved.small),
                            "reduce_scatter_ms": round(1e3 * times.scatter, 4),
                            "all_gather_ms": round(1e3 * times.gather, 4),
                            "small_all_reduces_ms": round(1e3 * times.small, 4),
                            "bytes_per_rank_zero2": memory,
                        }
                    )
    return rows


def step_predictions(
    parts: Parts, network: Network, model: str, ranks: Sequence[int], tokens: int
) -> list[dict[str, Any]]:
    """Whole steps, learned beside AdamW, sharded beside replicated."""
    shapes, rows = shapes_of(PRESETS[model]), []
    for world in ranks:
        beside = step_times(parts, network, shapes, "AdamW", ranks=world, tokens=tokens)
        for optimizer in parts.step_s:
            for layout in ("zero", "fsdp2", "replicated"):
                times = step_times(
                    parts, network, shapes, optimizer, ranks=world, tokens=tokens, layout=layout
                )
                rows.append(
                    {
                        "predicted": True,
                        "network": network.name,
                        "model": model,
                        "optimizer": optimizer,
                        "layout": layout,
                        "ranks": world,
                        "tokens_per_rank": tokens,
                        "exposed_ms": round(1e3 * times.exposed, 3),
                        "hidden_ms": round(1e3 * times.hidden, 3),
                        "parts_ms": {
                            part: round(1e3 * seconds, 4) for part, seconds in asdict(times).items()
                        },
                        "tokens_per_s_over_adamw_zero1": round(beside.hidden / times.hidden, 4),
                    }
                )
    return rows


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a GPU's datasheet says: dense bfloat16 FLOP/s and bytes per second of its memory."""

    flops: float
    memory: float
    source: str


GPUS = {
    "H200": Gpu(989.5e12, 4.8e12, "NVIDIA H200 datasheet"),
    "A100 80GB": Gpu(312e12, 2.039e12, "NVIDIA A100 80GB datasheet"),
}
USED = 0.4  # of the FLOP/s, assumed
ADAMW_BYTES = 28  # read and written per parameter, float32


def allowances(models: Sequence[str], goal: float, ranks: int, tokens: int) -> list[dict[str, Any]]:
    """How long a rank's learned step may take on GPUs for the goal of bench_train.py, if nothing
    else differs from AdamW.

    Forward and backward take 6 N T FLOP at USED of the datasheet's rate, AdamW's step moves its
    bytes at the memory's.
    """
    rows = []
    for model in models:
        numel = sum(math.prod(shape) for shape in shapes_of(PRESETS[model]).values())
        for name, gpu in GPUS.items():
            compute = 6.0 * numel * tokens / (USED * gpu.flops)
            adamw = ADAMW_BYTES * numel / ranks / gpu.memory
            rows.append(
                {
                    "assumed": f"{USED} of {gpu.flops / 1e12:g} TFLOP/s, {gpu.memory / 1e12:g} "
                    f"TB/s ({gpu.source})",
                    "gpu": name,
                    "model": model,
                    "ranks": ranks,
                    "tokens_per_rank": tokens,
                    "forward_and_backward_ms": round(1e3 * compute, 3),
                    "adamw_step_ms": round(1e3 * adamw, 4),
                    "learned_step_may_take_ms": round(
                        1e3 * ((compute + adamw) / goal - compute), 4
                    ),
                }
            )
    return rows


def read_parts(path: Path | None) -> tuple[Parts | None, str]:
    """The parts in a train.json whose goal was computed, and what they were measured on, or why
    there are none.
    """
    if path is None or not path.is_file():
        return None, "no file of bench_train.py was named with --parts"
    goal = json.loads(path.read_text()).get("goal") or {}
    if "parts" not in goal:
        return None, f"{path.name} holds no parts: its goal was measured, or left out"
    found = goal["parts"]
    step_s = {name: 1e-9 * value for name, value in found["step_ns_per_parameter"].items()}
    return Parts(
        1e-6 * found["forward_and_backward_us_per_token"],
        step_s,
        source=f"{path.name}: {goal['on']}",
    ), goal["on"]


def predictions(
    parts: Parts | None, where: str, models: Sequence[str], ranks: Sequence[int], tokens: int
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "predicted": True,
        "networks": {name: asdict(network) for name, network in NETWORKS.items()},
        "exchange": exchange_predictions(models, ranks),
        "allowances": allowances(models, GOAL, GOAL_RANKS, tokens),
        "steps": [],
        "steps_absent": None,
    }
    if parts is None:
        return {**result, "steps_absent": where}
    # A CPU core is too slow for these networks to matter; its rows show what sharding alone does.
    network = NETWORKS["H200 NVLink + NDR InfiniBand"]
    return {
        **result,
        "parts": asdict(parts),
        "steps_are_of": f"ranks that compute as {where} does, joined by {network.name}",
        "steps": step_predictions(parts, network, "124m", ranks, tokens),
    }


def tables(result: dict[str, Any]) -> str:
    lines = [
        [
            "ranks",
            "optimizer",
            "measured, ms",
            "modelled, ms (exposed)",
            "error",
            "bytes counted",
            "bytes modelled",
        ]
    ]
    for row in result["check"]["rows"]:
        error = "calibrated here" if row["calibrated"] else f"{row['error_exposed']:+.0%}"
        counted, modelled = (sum(row[key].values()) for key in ("counted_bytes", "modelled_bytes"))
        cells = [
            str(row["ranks"]),
            row["optimizer"],
            f"{row['measured_ms']:.1f}",
            f"{row['modelled_ms']['exposed']:.1f}",
            error,
        ]
        lines.append([*cells, f"{counted:,}", f"{modelled:,}"])
    ahead = [
        [
            "predicted: network, model",
            "ranks",
            "MB sent per rank",
            "reduce-scatter + all-gather, ms",
            "small all-reduces, ms",
        ]
    ]
    for row in result["predictions"]["exchange"]:
        if row["optimizer"] == "AdafacLO":
            exchange = row["reduce_scatter_ms"] + row["all_gather_ms"]
            cells = [
                f"{row['network']}, {row['model']}",
                str(row["ranks"]),
                f"{row['sent_bytes_per_rank'] / 1e6:,.0f}",
            ]
            ahead.append([*cells, f"{exchange:.2f}", f"{row['small_all_reduces_ms']:.3f}"])
    return f"{markdown(lines)}\n\n{markdown(ahead)}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Model step time and bytes on many ranks, check it here, predict."
    )
    parser.add_argument("--preset", choices=list(CONFIGS), default="mini")
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[1, 2, 4],
        help="gloo ranks of the check; 1 must be among them",
    )
    parser.add_argument("--predict", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument(
        "--models", nargs="+", default=["124m", "355m", "1.5b"], choices=list(PRESETS)
    )
    parser.add_argument("--tokens", type=int, default=128, help="per rank, in the check")
    parser.add_argument(
        "--predict-tokens", type=int, default=16384, help="per rank, in predictions"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--bucket-cap-mb", type=float, default=1.0, help="in the check")
    parser.add_argument(
        "--parts",
        type=Path,
        help="a train.json of bench_train.py; predictions of whole steps come from its parts",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.json")
    args = parser.parse_args()
    if 1 not in args.ranks:
        parser.error("--ranks needs 1: the parts are measured there")
    torch.set_num_threads(1)
    rounds = min(args.rounds, 3) if args.quick else args.rounds
    settings = Settings(args.preset, args.tokens, rounds, args.steps, args.bucket_cap_mb)
    found = environment()
    runs = list(on_ranks(sorted(args.ranks), measure_rank, settings))
    parts, where = read_parts(args.parts)
    result = {
        "what": "a model of step time and bytes, its error on the ranks of this machine, and "
        "predictions; see scaling.py",
        **found,
        "quick": args.quick,
        "settings": asdict(settings),
        "check": check(runs, settings),
        "predictions": predictions(parts, where, args.models, args.predict, args.predict_tokens),
    }
    write(result, args.out)
    print(tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tokens per second of whole training steps: learned optimizers beside AdamW, layout by layout;
write results/train.json.

    python benchmarks/bench_train.py          # 2 gloo ranks of its own, a small model
    torchrun --nproc_per_node=8 benchmarks/bench_train.py \\
        --preset 124m --tokens 4096 16384         # on GPUs with NCCL

Model and loss are those of launch/gpt2.py. All contenders are alive at once and take turns of a few
steps, so that a busy machine hurts all alike; the first step of a turn does not count. A step's
time is the slowest rank's; medians.

**The goal**: at 16384 tokens per GPU on 8 ranks at least 0.97 of the tokens per second of AdamW
under ZeRO-1, GPT-2 124M. Where these 8 GPUs are, it is measured. Elsewhere it is computed from
parts measured on one device, and marked so:

    ratio = (T t + N a / 8 + c) / (T t + N o / 8 + s + c)

T tokens per rank, t seconds per token of forward and backward, N parameters, a and o seconds per
parameter of AdamW's step and of the learned one, s the seconds of the learned optimizer's two small
all-reduces, c what both send besides. c is taken as 0, which can only lower the ratio.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from bench_memory import shapes_of
from bench_step import Contender, tensor_lists
from bench_zero import MINI
from model import build
from presets import PRESETS, GPTConfig
from record import RESULTS, environment, markdown, write
from scaling import GOAL, GOAL_RANKS
from step_model import small_syncs
from trainees import TINY, Stopwatch, Trainee, device_of, on_ranks, optimizer_of

CONFIGS = {"tiny": TINY, "mini": MINI, **PRESETS}
BASELINES = (("AdamW", "torch zero"), ("AdamW", "zero1"))
LEARNED = tuple(
    (name, layout)
    for name in ("AdafacLO", "VeLO")
    for layout in ("zero1", "zero2", "fsdp2", "deepspeed2")
)
CONTENDERS = (*BASELINES, ("AdamW", "fsdp2"), ("AdamW", "deepspeed2"), *LEARNED)
GOAL_TOKENS, GOAL_MODEL = 16384, "124m"


@dataclass(frozen=True, slots=True)
class Settings:
    """What all ranks must know. `tokens`: per rank and step; sequences are as long as the model
    allows, or as that number.
    """

    preset: str
    tokens: tuple[int, ...]
    rounds: int
    steps: int
    bucket_cap_mb: float
    contenders: tuple[tuple[str, str], ...]


def measure_rank(rank: int, world: int, settings: Settings) -> dict[str, Any]:
    """Wall seconds of every counted step by contender and tokens, and the time of the small
    all-reduces.
    """
    device, config = device_of(rank), CONFIGS[settings.preset]
    watch = Stopwatch(device)
    trainees, absent = {}, {}
    for name, layout in settings.contenders:
        try:
            trainee = Trainee(
                layout, name, config, bucket_cap_mb=settings.bucket_cap_mb, device=device
            )
        except ImportError as error:  # alike on all ranks: one installation
            absent[f"{name}, {layout}"] = str(error)
            continue
        trainees[trainee.name] = trainee
    taken: dict[str, dict[int, list[float]]] = {
        name: {tokens: [] for tokens in settings.tokens} for name in trainees
    }
    losses: dict[str, list[float]] = {name: [] for name in trainees}
    order = list(trainees)
    for number in range(settings.rounds):
        for tokens in settings.tokens:
            length = min(tokens, config.block_size)
            for name in order[number % len(order) :] + order[: number % len(order)]:
                trainee = trainees[name]
                idx = trainee.tokens(tokens // length, length)
                trainee.train(idx)
                dist.barrier()
                for _ in range(settings.steps):
                    watch.start()
                    loss = trainee.train(idx)
                    taken[name][tokens].append(watch.stop()[0])
                    losses[name].append(float(loss))
                trainee.settle()
    result = {
        "seconds": taken,
        "losses": losses,
        "absent": absent,
        "small_seconds": small_all_reduces(
            small_syncs(shapes_of(PRESETS[GOAL_MODEL]), "AdafacLO"), device
        ),
        "backend": dist.get_backend(),
        "device": str(device),
    }
    del trainee, trainees
    gc.collect()
    return result


def small_all_reduces(sizes: Sequence[int], device: torch.device, repeats: int = 20) -> float:
    """Seconds of all-reduces of these sizes in bytes, one after the other; median."""
    watch, found = Stopwatch(device), []
    buffers = [torch.zeros(size // 8, dtype=torch.float64, device=device) for size in sizes]
    for _ in range(repeats):
        watch.start()
        for buffer in buffers:
            dist.all_reduce(buffer)
        found.append(watch.stop()[0])
    return median(found)


def summarize(world: int, per_rank: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name in per_rank[0]["seconds"]:
        by_tokens = {}
        for tokens in settings.tokens:
            slowest = [
                max(steps)
                for steps in zip(
                    *(result["seconds"][name][tokens] for result in per_rank), strict=True
                )
            ]
            seconds = median(slowest)
            by_tokens[str(tokens)] = {
                "step_ms": round(1e3 * seconds, 2),
                "tokens_per_s": round(world * tokens / seconds, 1),
            }
        rows[name] = {"by_tokens_per_rank": by_tokens, "last_loss": per_rank[0]["losses"][name][-1]}
    baseline = next((f"{n}, {layout}" for n, layout in BASELINES if f"{n}, {layout}" in rows), None)
    for row in rows.values():
        for tokens, cell in row["by_tokens_per_rank"].items():
            if baseline is not None:
                beside = rows[baseline]["by_tokens_per_rank"][tokens]["tokens_per_s"]
                cell["over_baseline"] = round(cell["tokens_per_s"] / beside, 4)
    return {
        "ranks": world,
        "backend": per_rank[0]["backend"],
        "device": per_rank[0]["device"],
        "baseline": baseline,
        "small_all_reduces_ms": round(1e3 * max(result["small_seconds"] for result in per_rank), 4),
        "contenders": rows,
        "absent": per_rank[0]["absent"],
    }


# --------------------------------------------------------------------------------------------- goal


def seconds_per_token(config: GPTConfig, tokens: int, device: torch.device, repeats: int) -> float:
    """Forward and backward of a model on one device (CPU time on a CPU); median, the first pass not
    counted.
    """
    model, watch = build(config, 0).to(device), Stopwatch(device)
    idx = torch.randint(
        0, config.vocab_size, (1, tokens + 1), generator=torch.Generator().manual_seed(0)
    ).to(device)
    found = []
    for _ in range(repeats + 1):
        model.zero_grad()
        watch.start()
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        found.append(watch.stop()[1])
    return median(found[1:]) / tokens


def seconds_per_parameter(
    device: torch.device, rounds: int, blocks: int | None
) -> dict[str, float]:
    """Of a plain step over GPT-2 124M's tensors, by optimizer; in turns (CPU time on a CPU).
    `blocks`: see bench_step.py.
    """
    shapes = tensor_lists(blocks)["GPT-2 124M"]

    def make(name: str, params: Any) -> Any:
        kind, arguments = optimizer_of(name)
        return kind(params, **arguments)

    entries = [
        Contender(name, shapes, device.type, partial(make, name))
        for name in ("AdamW", "AdafacLO", "VeLO")
    ]
    for entry in entries:
        entry.step()
    for _ in range(rounds):
        for entry in entries:
            entry.measure()
    return {entry.name: median(entry.seconds["step"]) / entry.numel for entry in entries}


def goal_ratio(
    token_s: float, adamw_s: float, learned_s: float, small_s: float, parameters: int
) -> float:
    """The learned optimizer's tokens per second over AdamW's, see the top of this file."""
    shared, share = GOAL_TOKENS * token_s, parameters / GOAL_RANKS
    return (shared + share * adamw_s) / (shared + share * learned_s + small_s)


def goal(runs: Sequence[dict[str, Any]], settings: Settings, quick: bool) -> dict[str, Any]:
    """The goal, measured where its 8 GPUs were, else computed from parts."""
    found: dict[str, Any] = {
        "what": f"tokens per second over those of AdamW under ZeRO-1; GPT-2 {GOAL_MODEL}, "
        f"{GOAL_TOKENS} tokens per GPU, {GOAL_RANKS} ranks",
        "wanted": GOAL,
    }
    for run in runs:
        at_goal = (
            run["ranks"] == GOAL_RANKS
            and settings.preset == GOAL_MODEL
            and GOAL_TOKENS in settings.tokens
        )
        if at_goal and run["device"].startswith("cuda"):
            ratios = {
                name: row["by_tokens_per_rank"][str(GOAL_TOKENS)]["over_baseline"]
                for name, row in run["contenders"].items()
            }
            learned = {
                name: ratio for name, ratio in ratios.items() if not name.startswith("AdamW")
            }
            return {
                **found,
                "computed": False,
                "ratio": learned,
                "met": all(ratio >= GOAL for ratio in learned.values()),
            }
    device = device_of(0)
    config = PRESETS[GOAL_MODEL]
    tokens, blocks = (256, 2) if device.type == "cpu" else (config.block_size, None)
    if quick and device.type == "cpu":
        tokens = 128
    parameters = sum(math.prod(shape) for shape in shapes_of(config).values())
    token_s = seconds_per_token(config, tokens, device, repeats=1 if quick else 3)
    step_s = seconds_per_parameter(device, 3 if quick else 7, blocks)
    small_s = max((run["small_all_reduces_ms"] for run in runs), default=0.0) * 1e-3
    ratio = {
        name: round(goal_ratio(token_s, step_s["AdamW"], step_s[name], small_s, parameters), 4)
        for name in ("AdafacLO", "VeLO")
    }
    return {
        **found,
        "computed": True,
        "on": "one core of this CPU for every rank"
        if device.type == "cpu"
        else torch.cuda.get_device_name(),
        "parts": {
            "forward_and_backward_us_per_token": round(1e6 * token_s, 3),
            "measured_at_tokens": tokens,
            "step_ns_per_parameter": {
                name: round(1e9 * seconds, 3) for name, seconds in step_s.items()
            },
            "small_all_reduces_ms": round(1e3 * small_s, 4),
            "parameters": parameters,
        },
        "ratio": ratio,
        "met": all(value >= GOAL for value in ratio.values()),
    }


def table(run: dict[str, Any], settings: Settings) -> str:
    lines = [
        ["tokens/s (of the baseline)", *(f"{tokens} tokens per rank" for tokens in settings.tokens)]
    ]
    for name, row in run["contenders"].items():
        cells = [row["by_tokens_per_rank"][str(tokens)] for tokens in settings.tokens]
        lines.append(
            [
                name,
                *(
                    f"{cell['tokens_per_s']:,.0f} ({cell.get('over_baseline', float('nan')):.3f})"
                    for cell in cells
                ),
            ]
        )
    title = (
        f"{run['ranks']} ranks, {run['backend']}, {settings.preset}; baseline: {run['baseline']}"
    )
    return f"### {title}\n\n{markdown(lines)}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Tokens per second of whole training steps beside AdamW."
    )
    parser.add_argument("--preset", choices=list(CONFIGS), default="mini")
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[2],
        help="without torchrun: how many gloo ranks to start",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        help="per rank and step; default: 128 512 2048, with --quick 128 1024",
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contender")
    parser.add_argument("--steps", type=int, default=2, help="counted steps of a turn")
    parser.add_argument("--bucket-cap-mb", type=float, default=1.0)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="LAYOUT",
        help="layouts of the learned optimizers, e.g. zero1 fsdp2",
    )
    parser.add_argument("--no-goal", action="store_true", help="leave the goal out")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and tokens")
    parser.add_argument("--out", type=Path, default=RESULTS / "train.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(
        preset=args.preset,
        tokens=tuple(args.tokens or ((128, 1024) if args.quick else (128, 512, 2048))),
        rounds=min(args.rounds, 3) if args.quick else args.rounds,
        steps=args.steps,
        bucket_cap_mb=args.bucket_cap_mb,
        contenders=tuple(
            c for c in CONTENDERS if not args.only or c in BASELINES or c[1] in args.only
        ),
    )
    found, runs = environment(), []
    for world, per_rank in on_ranks(args.ranks, measure_rank, settings):
        runs.append(summarize(world, per_rank, settings))
        print(table(runs[-1], settings), flush=True)
    if not runs:  # not the first of torchrun's ranks
        return 0
    result = {
        "what": "tokens per second of training steps of launch/model.py's GPT on all ranks "
        "together; see bench_train.py",
        **found,
        "quick": args.quick,
        "settings": {**asdict(settings), "model": asdict(CONFIGS[settings.preset])},
        "runs": runs,
        "goal": None if args.no_goal else goal(runs, settings, args.quick),
    }
    write(result, args.out)
    if result["goal"] is not None:
        how = "computed" if result["goal"]["computed"] else "measured"
        print(f"\n{result['goal']['what']}: {result['goal']['ratio']} ({how}; wanted {GOAL})")
    return 0


if __name__ == "__main__":
    sys.exit(main())

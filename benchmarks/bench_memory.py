"""Measure what a rank holds against a formula; write results/memory.json and print the table of the
README.

    python benchmarks/bench_memory.py               # about 4 minutes on two CPU cores
    python benchmarks/bench_memory.py --large       # GPT-2 124m on two ranks too: 7 GB, 3 minutes
                                                    # more

Counted are the bytes that torch allocates, from before the model is built, by torch.profiler's
memory events: parameters, gradients, state, buckets on their way, scratch, whoever holds them. Not
counted is what the communication library allocates for itself. Activations are counted too, and
kept below one per cent by a batch of one short sequence.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from model import GPT, build
from presets import PRESETS, GPTConfig
from record import environment, markdown, write
from step_model import planned
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

import pylo_dist
from pylo_dist.adapters.zero.freed import FreedGradient
from pylo_dist.maths import compiled
from pylo_dist.maths.reference import CHUNK_CPU
from support.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "memory.json"
MB = 1e6
# Of a learned optimizer's step on a CPU: chunks of features in plain PyTorch (see reference.py),
# none in the compiled passes.
SCRATCH = 120 * 4 * CHUNK_CPU if compiled.library("cpu") else 0  # library() says why there is none
# 6.4M parameters, of which no tensor is large: what is measured is the layout, not one embedding.
LAYOUTS = (
    "ddp",
    "zero1",
    "zero2",
    "fsdp2",
    "hsdp",
    "tp",
    "torch zero",
    "deepspeed1",
    "deepspeed2",
    "deepspeed3",
)
LAYOUT_CASES = [(layout, optimizer) for layout in LAYOUTS for optimizer in ("AdafacLO", "AdamW")]
SMALL = GPTConfig(vocab_size=256, block_size=32, n_layer=8, n_head=4, n_embd=256, init_std=0.03)
TOKENS = 8
HALVED = "AdafacLO, bfloat16"  # an optimizer: with state in it

Shapes = Mapping[str, Sequence[int]]


# ------------------------------------------------------------------------------------------ formula


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank. `peak` is of all at once, transients included; `gradients` are what is
    there when the step begins.
    """

    parameters: int
    gradients: int
    state: int
    peak: int


def memory_formula(
    shapes: Shapes,
    optimizer: str,
    *,
    ranks: int,
    stage: int,
    bucket_cap_mb: float | None = None,
    tied: int = 0,
    wire_copies: int = 0,
) -> Memory:
    """What a rank holds with float32 parameters, N of them in all, on R ranks.

        parameters   4 N
        gradients    4 N (plain), 4 N + 4 N / R (stage 1), 4 N / R (stage 2)
        state        AdafacLO: 16 N / R and 12 (rows + columns) of every factored tensor, 28 N / R
                     for tensors below two dims; where its means are bfloat16 8 N / R less
                     AdamW: 8 N / R
        peak         the larger of: all of these with the scratch of a step; and the worst moment of
                     backward, when two buckets, or slices of a large one, are on their way and
                     the gradients of a third are there

    Args:
        shapes: of the parameters by name, in the order of the model.
        optimizer: "AdafacLO", HALVED or "AdamW". stage: 0: not sharded.
        bucket_cap_mb: as `ZeroOptimizer`.
        tied: elements of a parameter that is used at both ends of the model. Autograd holds its
            first gradient all through backward, until it has made the second one, of the same size.
        wire_copies: how many copies of a bucket the backend makes to send it: gloo, whose
            reduce-scatter is an all-reduce of a copy, 1; NCCL 0.
    """
    numel = sum(math.prod(shape) for shape in shapes.values())
    ranks = ranks if stage else 1
    learned = optimizer != "AdamW"
    state = sum(_state_bytes(shape, ranks, optimizer) for shape in shapes.values())
    full, shard = 4 * numel, 4 * numel // ranks
    gradients = {0: full, 1: full + shard, 2: shard}[stage]
    buckets = [(4 * n, len(slices)) for n, slices in planned(shapes, bucket_cap_mb, ranks)]
    held = 4 * numel + state + (SCRATCH if learned else 0)
    backward = (
        full + 4 * tied if stage == 0 else _backward(buckets, ranks, stage, 4 * tied, wire_copies)
    )
    return Memory(full, gradients, state, held + max(gradients, backward))


def _state_bytes(shape: Sequence[int], ranks: int, optimizer: str) -> int:
    elements, means = math.prod(shape) / ranks, 8 if optimizer == HALVED else 16
    if optimizer == "AdamW":
        return round(8 * elements)
    if len(shape) < 2:
        return round((means + 12) * elements)
    rows_and_columns = sum(math.prod(shape) // size for size in sorted(shape)[-2:])
    return round(means * elements) + 12 * rows_and_columns


def _backward(
    buckets: Sequence[tuple[int, int]], ranks: int, stage: int, tied: int, wire_copies: int
) -> int:
    """The most that gradients and buckets on their way take in a backward pass, in bytes.

    Args:
        buckets: in the order of their departure, bytes and the number of slices.
    """
    worst, kept, shards = 0.0, 0, 0.0
    flights = [0.0, 0.0]  # full slices on their way, with the copies of the backend
    for i, (size, slices) in enumerate(buckets):
        part, last = size / slices, i == len(buckets) - 1
        # the first gradient of the tied parameter; at the end, where both are there, one is in the
        # bucket
        worst = max(worst, kept + size + tied + sum(flights) + shards)
        there = kept + size + (0 if last else tied)
        shards += size / ranks
        for left in reversed(range(slices)):
            # what arrives of one slice of several is written to the gradient of the whole
            flights = [flights[1], part if slices == 1 else part + part / ranks]
            # packed: the gradients are there twice
            worst = max(worst, there + sum(flights) + shards)
            flights[1] += wire_copies * part
            if stage == 2 and left == 0:
                there -= size
            worst = max(worst, there + sum(flights) + shards)
        kept += size if stage == 1 else 0
    return round(worst)


def shapes_of(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = GPT(config)
    return {fqn: tuple(param.shape) for fqn, param in model.named_parameters()}


# -------------------------------------------------------------------------------------- measurement


@dataclass(frozen=True, slots=True)
class Measured(Memory):
    """What one rank held.

    Attributes:
        by_phase: the peak in the building, and in "forward", "backward" and "step" once there was a
            step.
        report: what the optimizer's `report()` says about its state in bytes; 0 for AdamW.
    """

    by_phase: dict[str, int]
    report: int


def measure(
    config: GPTConfig, optimizer: str, stage: int, bucket_cap_mb: float, steps: int = 3
) -> Measured:
    """`measure_training` of a GPT on one sequence of TOKENS tokens."""
    idx = torch.randint(
        0, config.vocab_size, (1, TOKENS + 1), generator=torch.Generator().manual_seed(0)
    )
    return measure_training(
        lambda: build(config, 0),
        lambda model: model(idx[:, :-1], idx[:, 1:])[1],
        optimizer,
        stage,
        bucket_cap_mb,
        steps,
    )


def measure_training(
    make: Callable[[], nn.Module],
    loss_of: Callable[[nn.Module], Tensor],
    optimizer: str,
    stage: int,
    bucket_cap_mb: float,
    steps: int = 3,
) -> Measured:
    """Train under the profiler.

    Args:
        make: the model.
        optimizer: "AdafacLO", HALVED or "AdamW" (fused). stage: 0: not sharded.
        steps: the last is the one that counts; 0: one forward and backward pass, without a step.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with record_function("memory: build"):
            model = make()
            chosen = make_optimizer(model, optimizer, stage, bucket_cap_mb)
        gradients = 0
        for step in range(max(steps, 1)):
            suffix = "" if step == max(steps, 1) - 1 else ", earlier"
            with record_function(f"memory: forward{suffix}"):
                loss = loss_of(model)
            with record_function(f"memory: backward{suffix}"):
                loss.backward()
                groups = chosen.param_groups  # brings the gradients that are still on their way
            gradients = gradient_bytes(model, groups)
            if steps:
                with record_function(f"memory: step{suffix}"):
                    chosen.step()
                chosen.zero_grad()
        # or gloo's threads record what goes on into memory that the profiler frees when it stops
        model.state_dict()
    state = sum(
        num_bytes(t) for entries in chosen.state.values() for t in entries.values() if t.dim()
    )
    report = chosen.report() if hasattr(chosen, "report") else []
    peaks = peaks_of(profiler)
    at_work = [peak for name, peak in peaks.items() if name in ("forward", "backward", "step")]
    result = Measured(
        parameters=sum(num_bytes(param) for param in model.parameters()),
        gradients=gradients,
        state=state,
        peak=max(at_work),
        by_phase=peaks,
        report=sum(row["state_bytes"] for row in report if row["rule"] != "AdamW"),
    )
    del chosen, model, loss, groups
    gc.collect()
    return result


def make_optimizer(model: nn.Module, optimizer: str, stage: int, bucket_cap_mb: float) -> Any:
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "AdafacLO": (pylo_dist.AdafacLO, {"weights": "demo"}),
        HALVED: (pylo_dist.AdafacLO, {"weights": "demo", "state_dtype": "bfloat16"}),
        "AdamW": (torch.optim.AdamW, {"fused": True}),
    }
    optimizer_class, arguments = kinds[optimizer]
    if stage == 0:
        return optimizer_class(model.named_parameters(), **arguments)
    return pylo_dist.ZeroOptimizer(
        model, optimizer_class, stage=stage, bucket_cap_mb=bucket_cap_mb, **arguments
    )


def gradient_bytes(model: nn.Module, groups: list[dict[str, Any]]) -> int:
    """Of the parameters' gradients and of the shards', what they share counted once."""
    grads = (param.grad for param in model.parameters())
    own = [grad for grad in grads if not isinstance(grad, FreedGradient)]
    pieces = [param.grad for group in groups for param in group["params"]]
    distinct = {
        (grad.data_ptr(), grad.numel()): num_bytes(grad)
        for grad in (*own, *pieces)
        if grad is not None and grad.numel()
    }
    return sum(distinct.values())


def num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of one rank in a layout: of parameters and state between steps, and the peak of a step,
    transients included.
    """

    parameters: int
    state: int
    peak: int


def measure_layouts(
    rank: int, world: int, config: GPTConfig, cases: Sequence[tuple[str, str]], bucket_cap_mb: float
) -> dict[str, Held | str]:
    """By "optimizer, layout" what this rank holds, or why it could not be had; for `run_ranks`.
    `cases`: layout and optimizer.
    """
    from trainees import Trainee  # which needs what only some of these layouts need

    warnings.simplefilter("ignore")
    found: dict[str, Held | str] = {}
    for layout, optimizer in cases:
        name, trainee = f"{optimizer}, {layout}", None
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            try:
                trainee = Trainee(
                    layout,
                    optimizer,
                    config,
                    bucket_cap_mb=bucket_cap_mb,
                    device=torch.device("cpu"),
                )
            except ImportError as error:  # alike on all ranks: one installation
                found[name] = str(error)
                continue
            idx = trainee.tokens(1, TOKENS)
            trainee.train(idx)
            with record_function("memory: step"):
                trainee.train(idx)
            # or gloo's threads record what goes on into memory that the profiler frees when it
            # stops
            trainee.settle()
        found[name] = Held(
            trainee.parameter_bytes(), trainee.state_bytes(), peaks_of(profiler)["step"]
        )
        del trainee
        gc.collect()
        if rank == 0:
            print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def by_layout(
    config: GPTConfig, ranks: int, cases: Sequence[tuple[str, str]], bucket_cap_mb: float
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Bytes per parameter of the model on the rank with the highest peak, by layout and optimizer;
    and why some are absent.
    """
    per_rank = run_ranks(ranks, measure_layouts, config, list(cases), bucket_cap_mb)
    elements = sum(math.prod(shape) for shape in shapes_of(config).values())
    rows, absent = [], {}
    for layout, optimizer in cases:
        name = f"{optimizer}, {layout}"
        held = [found[name] for found in per_rank]
        if isinstance(held[0], str):
            absent[name] = held[0]
            continue
        worst = max(held, key=lambda h: h.peak)
        per_parameter = {key: round(value / elements, 3) for key, value in asdict(worst).items()}
        all_state = sum(h.state for h in held)
        rows.append(
            {
                "layout": layout,
                "optimizer": optimizer,
                "ranks": ranks,
                "bytes": asdict(worst),
                "bytes_per_parameter": per_parameter,
                "state_bytes_of_all_ranks": all_state,
            }
        )
    return rows, absent


def layout_table(rows: list[dict[str, Any]]) -> str:
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    keys = ("parameters", "state", "peak")
    lines = [
        [
            "bytes per parameter and rank",
            *(f"{optimizer}: {', '.join(keys)}" for optimizer in optimizers),
        ]
    ]
    for layout in layouts:
        cells = []
        for optimizer in optimizers:
            own = next(
                (
                    r["bytes_per_parameter"]
                    for r in rows
                    if (r["layout"], r["optimizer"]) == (layout, optimizer)
                ),
                None,
            )
            cells.append("-" if own is None else ", ".join(f"{own[key]:.2f}" for key in keys))
        lines.append([layout, *cells])
    return markdown(lines)


def raw_events(profiler: profile) -> list[Any]:
    """The events of a profile as they were taken; `profiler.events()` would first sort them into a
    tree, which takes minutes.
    """
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    return list(profiler.profiler.kineto_results.events())


def changes_of(profiler: profile) -> list[tuple[int, int]]:
    """(time in ns, bytes) of every allocation and release, in order.

    The profiler does not see a release in a thread of the backend. Where memory is handed out that
    seems to be in use, it has been released just before.
    """
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    found, todo = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation:
            found.append(
                (event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size)
            )
    alive: dict[int, int] = {}
    changes = []
    for when, address, size in sorted(found, key=lambda entry: entry[0]):
        released = alive.pop(address, 0)
        if size > 0:
            alive[address] = size
        changes.append((when, max(size, 0) - released))
    return changes


def peaks_of(profiler: profile) -> dict[str, int]:
    """The most bytes alive in every range "memory: ..." of a profile."""
    events, changes = raw_events(profiler), changes_of(profiler)
    ranges = [
        (e.start_ns(), e.start_ns() + e.duration_ns(), e.name())
        for e in events
        if e.name().startswith("memory: ")
    ]
    peaks: dict[str, int] = {}
    live = place = 0
    for start, end, name in sorted(ranges):
        while place < len(changes) and changes[place][0] < start:
            live += changes[place][1]
            place += 1
        peak = live
        while place < len(changes) and changes[place][0] <= end:
            live += changes[place][1]
            place += 1
            peak = max(peak, live)
        peaks[name.removeprefix("memory: ")] = peak
    return peaks


# ------------------------------------------------------------------------------------------- tables

Case = tuple[str, int]  # optimizer and stage
CASES: list[Case] = [
    (optimizer, stage) for optimizer in ("AdafacLO", "AdamW") for stage in (0, 1, 2)
]


def measure_cases(
    rank: int, world: int, config: GPTConfig, cases: list[Case], cap_mb: float, steps: int
) -> list[Measured]:
    """For `run_ranks`."""
    return [measure(config, optimizer, stage, cap_mb, steps) for optimizer, stage in cases]


def compare(
    name: str, config: GPTConfig, ranks: int, cases: list[Case], cap_mb: float, steps: int
) -> list[dict[str, Any]]:
    """Measured beside computed, by case; of the rank with the highest peak."""
    per_rank = run_ranks(ranks, measure_cases, config, cases, cap_mb, steps)
    rows = []
    for i, (optimizer, stage) in enumerate(cases):
        found = max((measured[i] for measured in per_rank), key=lambda m: m.peak)
        computed = formula_of(
            config, optimizer, ranks=ranks, stage=stage, cap_mb=cap_mb, wire_copies=1
        )
        rows.append(
            {
                "model": name,
                "optimizer": optimizer,
                "stage": stage,
                "ranks": ranks if stage else 1,
                "bucket_cap_mb": cap_mb,
                "steps": steps,
                "measured": asdict(found),
                "computed": asdict(computed),
                "peak_measured_over_computed": round(found.peak / computed.peak, 4),
            }
        )
        print(
            f"{name} {optimizer} stage {stage} on {ranks}: {found.peak / computed.peak:.4f}",
            file=sys.stderr,
            flush=True,
        )
    return rows


def formula_of(
    config: GPTConfig,
    optimizer: str,
    *,
    ranks: int,
    stage: int,
    cap_mb: float | None = None,
    wire_copies: int = 0,
) -> Memory:
    """`memory_formula` of launch/model.py's GPT, whose token embedding is its output layer too."""
    tied = config.vocab_size * config.n_embd
    return memory_formula(
        shapes_of(config),
        optimizer,
        ranks=ranks,
        stage=stage,
        bucket_cap_mb=cap_mb,
        tied=tied,
        wire_copies=wire_copies,
    )


def megabytes(bytes_: float) -> str:
    return f"{bytes_ / MB:,.1f}" if bytes_ < 1000 * MB else f"{bytes_ / MB:,.0f}"


def measured_table(rows: list[dict[str, Any]]) -> str:
    names = ("parameters", "gradients", "state", "peak")
    head = [
        "model",
        "optimizer",
        "stage",
        "ranks",
        *(f"{name}, MB" for name in names),
        "peak computed",
        "measured / computed",
    ]
    lines = [head]
    for row in rows:
        stage = "-" if row["stage"] == 0 else str(row["stage"])
        cells = [
            row["model"],
            row["optimizer"],
            stage,
            str(row["ranks"]),
            *(megabytes(row["measured"][name]) for name in names),
        ]
        lines.append(
            [
                *cells,
                megabytes(row["computed"]["peak"]),
                f"{row['peak_measured_over_computed']:.3f}",
            ]
        )
    return markdown(lines)


def computed_rows() -> list[dict[str, Any]]:
    rows = []
    for model in ("124m", "355m", "774m", "1.5b"):
        for ranks in (1, 8, 64):
            for optimizer in ("AdafacLO", "AdamW"):
                for stage in (0,) if ranks == 1 else (1, 2):
                    computed = formula_of(PRESETS[model], optimizer, ranks=ranks, stage=stage)
                    rows.append(
                        {
                            "model": model,
                            "optimizer": optimizer,
                            "stage": stage,
                            "ranks": ranks,
                            **asdict(computed),
                        }
                    )
    return rows


def computed_table(rows: list[dict[str, Any]]) -> str:
    def of(optimizer: str, row: dict[str, Any]) -> dict[str, Any]:
        key = (row["model"], row["stage"], row["ranks"])
        return next(
            r
            for r in rows
            if r["optimizer"] == optimizer and (r["model"], r["stage"], r["ranks"]) == key
        )

    lines = [
        [
            "model",
            "ranks",
            "stage",
            "parameters",
            "gradients",
            "state",
            "peak",
            "AdamW: state",
            "AdamW: peak",
        ],
    ]
    for row in (r for r in rows if r["optimizer"] == "AdafacLO"):
        beside = of("AdamW", row)
        stage = "-" if row["stage"] == 0 else str(row["stage"])
        numbers = [
            row["parameters"],
            row["gradients"],
            row["state"],
            row["peak"],
            beside["state"],
            beside["peak"],
        ]
        lines.append([row["model"], str(row["ranks"]), stage, *(f"{n / 1e9:.3f}" for n in numbers)])
    return markdown(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Measure the memory of a rank against the formula."
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="ZeRO on two ranks only, layouts with two blocks of the model",
    )
    parser.add_argument(
        "--layout-ranks", type=int, default=4, help="of the table by layout; a multiple of 2"
    )
    parser.add_argument("--large", action="store_true", help="GPT-2 124m on two ranks too")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    found = environment()  # before the runs: the commit that was measured
    rows = compare("6.4M", SMALL, 2, CASES, 0.5, 2)
    if not args.quick:
        rows += compare(
            "6.4M", SMALL, 4, [case for case in CASES if case[0] == "AdafacLO" and case[1]], 0.5, 2
        )
    if args.large:
        rows += compare("124m", PRESETS["124m"], 2, [case for case in CASES if case[1]], 25.0, 0)
    # split, for tensor parallelism
    layout_config = replace(SMALL, qkv="split", n_layer=2 if args.quick else SMALL.n_layer)
    layout_rows, absent = by_layout(layout_config, args.layout_ranks, LAYOUT_CASES, 0.5)
    result = {
        "what": "bytes that torch allocates on a rank, measured with torch.profiler, beside the "
        "formula of bench_memory.py",
        **found,
        "quick": args.quick,
        "backend": "gloo",
        "settings": {"tokens": TOKENS, "dtype": "float32", "scratch_bytes": SCRATCH},
        "measured": rows,
        "layouts": {
            "ranks": args.layout_ranks,
            "model": asdict(layout_config),
            "parameters": sum(math.prod(shape) for shape in shapes_of(layout_config).values()),
            "rows": layout_rows,
            "absent": absent,
        },
        "computed": computed_rows(),
    }
    write(result, args.out)
    print(measured_table(rows))
    print(
        f"\n{args.layout_ranks} ranks, {result['layouts']['parameters']:,} "
        f"parameters:\n\n{layout_table(layout_rows)}"
    )
    print("\nComputed, GB (NCCL, float32, buckets of the default size):\n")
    print(computed_table(result["computed"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

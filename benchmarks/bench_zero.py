"""Measure where the time of a sharded training step goes; write results/zero.json and print the
tables of the README.

    python benchmarks/bench_zero.py                            # 2 and then 4 gloo ranks of its own
    torchrun --nproc_per_node=2 benchmarks/bench_zero.py       # torchrun's ranks; NCCL where each
                                                               # has a GPU, else gloo
    python benchmarks/bench_zero.py --trace traces             # also torch.profiler traces with and
                                                               # without overlap

Model, loss and backward pass are those of launch/gpt2.py. All contenders are alive at once and take
turns of a few steps each, so that a busy machine hurts all alike; of a turn the first step is not
counted, so that every counted forward pass waits for the all-gather of a step before it. Times are
medians over steps: `step_ms` of the slowest rank, phases as means over ranks. Phases are exclusive:
what runs inside another phase is taken off it. "wait" is time in which this rank could do nothing
but wait for others: communication that nothing hides, and the slowness of other ranks. The package
has no timers; it names its phases, see pylo_dist/core/trace.py. On a GPU they are told apart only
without overlap, where the benchmark may wait for the device at every mark.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist

# imported later it would keep the process group alive beyond its end
import torch.distributed.nn.functional
from bench_memory import formula_of, num_bytes, raw_events
from model import build
from presets import PRESETS, GPTConfig
from record import environment, markdown, write
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

import pylo_dist
from pylo_dist.core import trace
from pylo_dist.core.rule import LearnedRule
from support.golden import velo_weights
from support.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "zero.json"
# 1.6M parameters: gradients of several buckets, and a step that leaves time for many on two cores
MINI = GPTConfig(vocab_size=256, block_size=128, n_layer=8, n_head=4, n_embd=128, init_std=0.05)
# 3.1M parameters in 148 tensors, those of sharded_step.py: the work per tensor shows
MANY = GPTConfig(vocab_size=5504, block_size=64, n_layer=12, n_head=4, n_embd=128, init_std=0.05)
CONFIGS = {"mini": MINI, "many": MANY, **PRESETS}
PROFILED_STEPS = 3

# ------------------------------------------------------------------------------------------- phases

FORWARD, BACKWARD, OTHER = "forward", "backward", "other"
PACK, SCATTER_WAIT = "reduce-scatter: pack", "reduce-scatter: wait"
A, B, C, SYNC_WAIT = "A", "B", "C", "small syncs: wait"
GATHER, GATHER_WAIT = "all-gather: start", "all-gather: wait"
PHASES = (FORWARD, BACKWARD, PACK, SCATTER_WAIT, A, B, C, SYNC_WAIT, GATHER, GATHER_WAIT, OTHER)
# which of them a phase of the package belongs to; any other belongs to what is around it
PARTS = {
    "reduce: launch": PACK,
    "reduce: land": PACK,
    "reduce: wait": SCATTER_WAIT,
    "step: inner": OTHER,
    "step: A": A,
    "step: B": B,
    **{f"step: {letter}": C for letter in "CDEF"},  # CELO2's further exchanges
    "sums: wait": SYNC_WAIT,
    "gather: start": GATHER,
    "gather: wait": GATHER_WAIT,
    **{own: own for own in (FORWARD, BACKWARD, OTHER)},  # of this file
}
PAYLOADS = {
    "collective: reduce_scatter": "reduce-scatter",
    "collective: all_gather": "all-gather",
    "collective: all_reduce": "small syncs",
}


class Clock:
    """Exclusive seconds by phase, and bytes handed to collectives, since `start`; an observer of
    the package.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.payload: dict[str, int] = defaultdict(int)
        self.waits_for_device = False
        self._stack: list[tuple[str, record_function]] = []
        self._mark = 0.0

    def start(self) -> None:
        self.seconds.clear()
        self.payload.clear()

    def _switch(self) -> None:
        if self.waits_for_device:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1][0]] += now - self._mark
        self._mark = now

    def begin(self, name: str, buffer: torch.Tensor | None = None) -> None:
        if buffer is not None and name in PAYLOADS:
            self.payload[PAYLOADS[name]] += num_bytes(buffer)
        if name in PARTS:
            self._switch()
            recorded = record_function(f"bench: {name}")
            self._stack.append((PARTS[name], recorded))
            recorded.__enter__()

    def end(self, name: str) -> None:
        if name in PARTS:
            self._stack[-1][1].__exit__(None, None, None)
            self._switch()
            self._stack.pop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.begin(name)
        try:
            yield
        finally:
            self.end(name)


# --------------------------------------------------------------------------------------- contenders


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to train on several ranks.

    Attributes:
        layout: "zero", "ddp", or "torch zero": DDP with torch's ZeroRedundancyOptimizer.
        optimizer: "AdafacLO", "VeLO" or "AdamW".
    """

    layout: str
    optimizer: str
    stage: int = 0
    overlap: bool = True

    @property
    def name(self) -> str:
        if self.layout == "zero":
            return f"ZeRO-{self.stage} {self.optimizer}" + ("" if self.overlap else ", no overlap")
        return (
            f"DDP + {self.optimizer}"
            if self.layout == "ddp"
            else f"DDP + ZeroRedundancyOptimizer {self.optimizer}"
        )


OVERLAPS = [
    Contender("zero", "AdafacLO", stage, overlap) for stage in (1, 2) for overlap in (True, False)
]
CONTENDERS = [
    *OVERLAPS,
    Contender("zero", "VeLO", 2),
    Contender("zero", "AdamW", 2),
    Contender("ddp", "AdafacLO"),
    Contender("ddp", "VeLO"),
    Contender("torch zero", "AdamW"),
]


@dataclass(frozen=True, slots=True)
class Settings:
    """What all ranks must know."""

    preset: str
    batch: int
    tokens: int
    rounds: int
    steps: int
    bucket_cap_mb: float
    threads: int
    contenders: tuple[Contender, ...]
    trace: str | None
    profiles: bool


class Trainee:
    """A contender with its model, on this rank."""

    def __init__(
        self, contender: Contender, settings: Settings, clock: Clock, device: torch.device
    ) -> None:
        self.contender, self._clock = contender, clock
        self.config = CONFIGS[settings.preset]
        self.model = build(self.config, 0).to(device)
        self.forward: Any = self.model
        kinds: dict[str, tuple[Any, dict[str, Any]]] = {
            "AdafacLO": (pylo_dist.AdafacLO, {"weights": "demo"}),
            "VeLO": (pylo_dist.VeLO, {"weights": velo_weights("release"), "num_steps": 1000}),
            "AdamW": (torch.optim.AdamW, {"fused": True}),
        }
        kind, arguments = kinds[contender.optimizer]
        cap = settings.bucket_cap_mb
        if contender.layout == "zero":
            self.optimizer: Any = pylo_dist.ZeroOptimizer(
                self.model,
                kind,
                stage=contender.stage,
                overlap=contender.overlap,
                bucket_cap_mb=cap,
                **arguments,
            )
            inner = self.optimizer.inner
        else:
            self.forward = DistributedDataParallel(self.model, bucket_cap_mb=cap)
            if contender.layout == "ddp":
                inner = self.optimizer = kind(self.model.named_parameters(), **arguments)
            else:
                self.optimizer = ZeroRedundancyOptimizer(self.model.parameters(), kind, **arguments)
                inner = self.optimizer.optim
        self._inner, self._learned = inner, isinstance(getattr(inner, "rule", None), LearnedRule)
        generator = torch.Generator().manual_seed(
            1 + (dist.get_rank() if dist.is_initialized() else 0)
        )
        shape = (settings.batch, settings.tokens + 1)
        self._idx = torch.randint(0, self.config.vocab_size, shape, generator=generator).to(device)
        self.losses: list[float] = []
        self.gradients = 0

    def step(self, count_gradients: bool = False) -> None:
        """One step; `count_gradients`: note how many bytes of them there are, which takes time."""
        with self._clock.phase(FORWARD):
            loss = self.forward(self._idx[:, :-1], self._idx[:, 1:])[1]
        with self._clock.phase(BACKWARD):
            loss.backward()
        with self._clock.phase(OTHER):
            if self._learned:
                self.optimizer.step(loss=loss)
            else:
                self.optimizer.step()
            if count_gradients:
                grads = [param.grad for param in self.model.parameters()]
                self.gradients = sum(num_bytes(grad) for grad in grads if grad is not None)
            self.optimizer.zero_grad()
        self.losses.append(float(loss.detach()))

    def look(self) -> None:
        """The forward pass of the next step alone, with which the parameters arrive."""
        with self._clock.phase(FORWARD), torch.no_grad():
            self.forward(self._idx[:, :-1])

    def settle(self) -> None:
        """Until all parameters are there."""
        self.model.state_dict()

    def memory(self) -> dict[str, Any]:
        """Bytes of this rank between steps; `full_gradients` those on the parameters when the
        optimizer stepped.
        """
        state = sum(
            num_bytes(t)
            for entries in self._inner.state.values()
            for t in entries.values()
            if t.dim()
        )
        found = {
            "parameters": sum(map(num_bytes, self.model.parameters())),
            "full_gradients": self.gradients,
            "state": state,
        }
        if not self._learned:
            return found
        report = self.optimizer.report()
        totals = report.totals
        found["state_by_report"] = sum(row["state_bytes"] for row in report)
        found["sharded_state"], found["replicated_state"] = (
            totals["sharded_state_bytes"],
            totals["replicated_state_bytes"],
        )
        return found


# -------------------------------------------------------------------------------------- measurement


def bytes_written() -> int | None:
    """What this process has written in its life, sockets included; None where the system does not
    say.
    """
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar:"))


@dataclass(slots=True)
class Sample:
    """One step of a contender on one rank: seconds, and bytes handed to collectives and written to
    sockets.
    """

    round: int
    wall_s: float
    cpu_s: float
    phases: dict[str, float]
    payload: dict[str, int] = field(default_factory=dict)
    written: int | None = None


def measure_rank(rank: int, world: int, settings: Settings) -> dict[str, Any]:
    """Everything one rank measures; for `run_ranks`."""
    clock = Clock()
    with trace.observe(clock):
        return _measure(rank, world, settings, clock)


def _measure(rank: int, world: int, settings: Settings, clock: Clock) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    device = (
        torch.device("cuda", rank % torch.cuda.device_count())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    trainees = [Trainee(contender, settings, clock, device) for contender in settings.contenders]
    samples: dict[str, list[Sample]] = {trainee.contender.name: [] for trainee in trainees}
    for trainee in trainees:  # the first step allocates
        trainee.step()
        trainee.settle()
    for number in range(settings.rounds):
        place = number % len(trainees)
        for trainee in trainees[place:] + trainees[:place]:
            samples[trainee.contender.name] += take_turn(
                trainee, clock, settings.steps, number, device
            )
    profiles: dict[str, Any] = {}
    if settings.profiles:
        for trainee in (trainee for trainee in trainees if trainee.contender in OVERLAPS):
            profiles[trainee.contender.name] = profile_overlap(trainee, settings.trace, rank, world)
    result = {
        "samples": {name: [asdict(sample) for sample in taken] for name, taken in samples.items()},
        "memory": {trainee.contender.name: trainee.memory() for trainee in trainees},
        "losses": {trainee.contender.name: trainee.losses for trainee in trainees},
        "profiles": profiles,
        "backend": dist.get_backend(),
        "device": str(device),
    }
    del trainee, trainees
    gc.collect()
    return result


def take_turn(
    trainee: Trainee, clock: Clock, steps: int, number: int, device: torch.device
) -> list[Sample]:
    """Steps one after the other; the first, which begins with all parameters in place, does not
    count.
    """
    clock.waits_for_device = device.type == "cuda" and not trainee.contender.overlap
    dist.barrier()
    trainee.step(count_gradients=True)
    taken = []
    for _ in range(steps):
        clock.start()
        wall, cpu, written = time.perf_counter(), time.process_time(), bytes_written()
        trainee.step()
        wall, cpu, after = time.perf_counter() - wall, time.process_time() - cpu, bytes_written()
        sent = None if written is None or after is None else after - written
        taken.append(Sample(number, wall, cpu, dict(clock.seconds), dict(clock.payload), sent))
    trainee.settle()
    return taken


Span = tuple[float, float]


def union(spans: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def common(first: Sequence[Span], second: Sequence[Span]) -> float:
    """How long both last at once; each without overlaps of its own."""
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in first for b in second)


def profile_overlap(trainee: Trainee, trace: str | None, rank: int, world: int) -> dict[str, float]:
    """When communication took place, from the events of torch.profiler over some steps:
    milliseconds of a step.

    `inside`: of it within the backward pass (reduce-scatter) or the next forward pass (all-gather).
    `hidden`: of that, while this rank was not waiting for it.
    """
    cuda = torch.cuda.is_available()
    dist.barrier()
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    ) as profiler:
        for _ in range(PROFILED_STEPS):
            trainee.step()
        trainee.look()  # the last all-gather has a forward pass to arrive in, as the others do
        trainee.settle()  # before the profiler stops, see bench_memory.py
    events = [
        (e.name(), (e.start_ns() / 1e6, (e.start_ns() + e.duration_ns()) / 1e6))
        for e in raw_events(profiler)
    ]

    def spans(wanted: str) -> list[Span]:
        return union([span for name, span in events if name == wanted])

    inner = spans("bench: step: inner")  # gloo's small sums look like its reduce-scatters
    carried = [
        (name.lower(), span)
        for name, span in events
        if (
            name.startswith("gloo:")
            if dist.get_backend() == "gloo"
            else name.lower().startswith("nccldevkernel")
        )
    ]
    outside = [
        (name, span) for name, span in carried if not any(a <= span[0] < b for a, b in inner)
    ]
    gathers = union([span for name, span in outside if "gather" in name])
    # gloo's is an all-reduce
    scatters = union([span for name, span in outside if "gather" not in name])
    found: dict[str, float] = {}
    for what, taken, range_, wait in (
        ("reduce_scatter", scatters, BACKWARD, "reduce: wait"),
        ("all_gather", gathers, FORWARD, "gather: wait"),
    ):
        inside = spans(f"bench: {range_}")
        waits = [span for span in spans(f"bench: {wait}") if common([span], inside)]
        found[f"{what}_ms"] = sum(end - start for start, end in taken) / PROFILED_STEPS
        found[f"{what}_inside_ms"] = common(taken, inside) / PROFILED_STEPS
        found[f"{what}_hidden_ms"] = (
            found[f"{what}_inside_ms"] - common(taken, waits) / PROFILED_STEPS
        )
    if trace is not None:
        name = trainee.contender.name.replace(", ", "_").replace(" ", "_")
        Path(trace).mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(Path(trace) / f"{name}_{rank}_of_{world}.json"))
    return {name: round(value, 3) for name, value in found.items()}


# ------------------------------------------------------------------------------------------ results


def summarize(per_rank: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """What all ranks measured, by contender."""
    world, rows = len(per_rank), {}
    slowest: dict[str, list[tuple[int, float]]] = {}
    for contender in settings.contenders:
        name = contender.name
        taken = [result["samples"][name] for result in per_rank]  # ranks x steps
        slowest[name] = [
            (steps[0]["round"], max(s["wall_s"] for s in steps))
            for steps in zip(*taken, strict=True)
        ]
        phases = {
            phase: 1e3
            * fmean(median(s["phases"].get(phase, 0.0) for s in steps) for steps in taken)
            for phase in PHASES
            if any(phase in s["phases"] for steps in taken for s in steps)
        }
        row: dict[str, Any] = {
            "step_ms": round(1e3 * median(wall for _, wall in slowest[name]), 2),
            "cpu_ms_of_all_ranks": round(
                1e3 * sum(median(s["cpu_s"] for s in steps) for steps in taken), 2
            ),
            "phases_ms": {phase: round(value, 3) for phase, value in phases.items()},
            "memory_bytes_by_rank": [result["memory"][name] for result in per_rank],
            "loss": [round(loss, 5) for loss in per_rank[0]["losses"][name]],
        }
        if contender.layout == "zero":
            row["exposed_ms"] = round(
                phases.get(SCATTER_WAIT, 0.0) + phases.get(GATHER_WAIT, 0.0), 3
            )
            payload = taken[0][0]["payload"]
            # of (ranks - 1) / ranks, sent by a ring
            share = {"reduce-scatter": 1, "all-gather": 1, "small syncs": 2}
            row["payload_bytes"] = payload
            row["ring_bytes_sent"] = {
                kind: round(n * share[kind] * (world - 1) / world) for kind, n in payload.items()
            }
        written = [s["written"] for steps in taken for s in steps]
        row["bytes_written_to_sockets"] = None if None in written else round(median(written))
        rows[name] = row
        profiles = [result["profiles"][name] for result in per_rank if name in result["profiles"]]
        if profiles:
            row["profile"] = {key: round(fmean(p[key] for p in profiles), 3) for key in profiles[0]}
    ratios = {}
    for on in (c for c in settings.contenders if c in OVERLAPS and c.overlap):
        off = next(
            (
                c
                for c in settings.contenders
                if c == Contender(on.layout, on.optimizer, on.stage, False)
            ),
            None,
        )
        if off is not None:
            ratios[on.name] = round(_round_ratio(slowest[on.name], slowest[off.name]), 4)
    return {"ranks": world, "backend": per_rank[0]["backend"], "device": per_rank[0]["device"]} | {
        "step_time_with_over_without_overlap": ratios,
        "contenders": rows,
    }


def _round_ratio(first: list[tuple[int, float]], second: list[tuple[int, float]]) -> float:
    """Median over rounds of the ratio of the times in a round."""

    def by_round(taken: list[tuple[int, float]]) -> dict[int, float]:
        return {number: sum(wall for n, wall in taken if n == number) for number, _ in taken}

    a, b = by_round(first), by_round(second)
    return median(a[number] / b[number] for number in a)


def promise(run: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """State bytes of every rank beside what `report()` and the formula say, by contender with
    AdafacLO.
    """
    rows = {}
    for contender in (
        c for c in settings.contenders if c.optimizer == "AdafacLO" and c.layout == "zero"
    ):
        memory = run["contenders"][contender.name]["memory_bytes_by_rank"]
        computed = formula_of(
            CONFIGS[settings.preset], "AdafacLO", ranks=run["ranks"], stage=contender.stage
        )
        rows[contender.name] = {
            "state_bytes": [m["state"] for m in memory],
            "report_bytes": [m["state_by_report"] for m in memory],
            "formula_bytes": computed.state,
            "largest_over_formula": round(max(m["state"] for m in memory) / computed.state, 6),
        }
    return rows


def tables(run: dict[str, Any], settings: Settings) -> str:
    rows = run["contenders"]
    of_zero = [name for name, row in rows.items() if "exposed_ms" in row]
    used = [phase for phase in PHASES if any(phase in rows[name]["phases_ms"] for name in of_zero)]
    split = [["ms per step", "step", *used]]
    for name in of_zero:
        phases = rows[name]["phases_ms"]
        split.append(
            [
                name,
                f"{rows[name]['step_ms']:.0f}",
                *(f"{phases[p]:.1f}" if p in phases else "" for p in used),
            ]
        )
    beside = [
        [
            "",
            "step, ms",
            "CPU of all ranks, ms",
            "MB written",
            "state per rank, MB",
            "full gradients, MB",
        ]
    ]
    for name, row in rows.items():
        written = row["bytes_written_to_sockets"]
        memory = [
            max(m[key] for m in row["memory_bytes_by_rank"]) / 1e6
            for key in ("state", "full_gradients")
        ]
        numbers = [
            f"{row['step_ms']:.0f}",
            f"{row['cpu_ms_of_all_ranks']:.0f}",
            "-" if written is None else f"{written / 1e6:.1f}",
        ]
        beside.append([name, *numbers, *(f"{m:.1f}" for m in memory)])
    exposed = [
        [
            "",
            "exposed, ms",
            "reduce-scatter: ms, in backward, hidden",
            "all-gather: ms, in forward, hidden",
        ]
    ]
    for name in (name for name in of_zero if "profile" in rows[name]):
        p = rows[name]["profile"]
        cells = []
        for kind in ("reduce_scatter", "all_gather"):
            total = max(p[f"{kind}_ms"], 1e-9)
            shares = (p[f"{kind}_inside_ms"] / total, p[f"{kind}_hidden_ms"] / total)
            cells.append(f"{total:.1f}, {shares[0]:.0%}, {shares[1]:.0%}")
        exposed.append([name, f"{rows[name]['exposed_ms']:.1f}", *cells])
    title = f"{run['ranks']} ranks, {run['backend']}, {settings.preset}"
    found = [
        f"### {title}",
        markdown(split),
        markdown(beside),
        *([markdown(exposed)] if len(exposed) > 1 else []),
    ]
    ratios = ", ".join(
        f"{name} {ratio:.3f}" for name, ratio in run["step_time_with_over_without_overlap"].items()
    )
    return "\n\n".join(
        [*found, *([f"step time with over without overlap: {ratios}"] if ratios else [])]
    )


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure where the time of a sharded training step goes."
    )
    parser.add_argument("--preset", choices=list(CONFIGS), default="mini")
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[2, 4],
        help="without torchrun: how many gloo ranks to start",
    )
    parser.add_argument("--batch", type=int, default=2, help="sequences per rank")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contender")
    parser.add_argument("--steps", type=int, default=2, help="counted steps of a turn")
    parser.add_argument("--bucket-cap-mb", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1, help="of every rank")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[c.name for c in CONTENDERS],
        metavar="NAME",
        help="contenders by name",
    )
    parser.add_argument("--trace", help="folder for traces of torch.profiler")
    parser.add_argument("--no-profiles", action="store_true", help="time only")
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args(words)


def main() -> int:
    args = parse()
    settings = Settings(
        preset=args.preset,
        batch=args.batch,
        tokens=args.tokens,
        rounds=args.rounds,
        steps=args.steps,
        bucket_cap_mb=args.bucket_cap_mb,
        threads=args.threads,
        contenders=tuple(c for c in CONTENDERS if not args.only or c.name in args.only),
        trace=args.trace,
        profiles=not args.no_profiles,
    )
    found, runs = environment(), []  # before the runs: the commit that was measured
    start = time.perf_counter()
    if "RANK" in os.environ:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        nccl = torch.cuda.is_available() and torch.cuda.device_count() >= int(
            os.environ.get("LOCAL_WORLD_SIZE", world)
        )
        dist.init_process_group("nccl" if nccl else "gloo", timeout=timedelta(minutes=10))
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, measure_rank(rank, world, settings))
        dist.destroy_process_group()
        if rank:
            return 0
        runs.append(summarize(gathered, settings))
    else:
        for world in args.ranks:
            runs.append(summarize(run_ranks(world, measure_rank, settings), settings))
            print(
                f"{world} ranks: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True
            )
    config = CONFIGS[settings.preset]
    result = {
        "what": "a training step of launch/model.py's GPT on several ranks, by phase; see "
        "bench_zero.py for what the words mean",
        **found,
        "load_average_after": os.getloadavg()[0],
        "settings": {
            **{key: value for key, value in asdict(settings).items() if key != "contenders"},
            "parameters": sum(p.numel() for p in build(config, 0).parameters()),
            "model": asdict(config),
            "velo_weights": "tests/golden/velo_release_meta_int8.npz",
        },
        "runs": runs,
        "state_as_promised": {f"{run['ranks']} ranks": promise(run, settings) for run in runs},
    }
    write(result, args.out)
    print("\n\n".join(tables(run, settings) for run in runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time one optimizer step on real lists of tensors: the compiled passes, plain PyTorch, AdamW, and
PyLO from a folder you name.

    python benchmarks/bench_step.py --device cpu --pylo ../pylo

On a CPU the figure is CPU time per parameter and core, and every contender of a list takes its turn
in every round, so that a busy machine slows all alike; medians of the rounds. Beside them the
ceilings of the same rounds: on a CPU fma_peak.cpp (chains of fused multiply-adds in registers;
without a compiler a matrix product, which is less), on a GPU a large float32 matrix product, and a
copy that no cache holds. Every rule is also given as its share of both. PyLO allocates a great
deal, so the whole comparison runs once as glibc ships and once with an allocator that keeps its
memory (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_). On a GPU: milliseconds between device
events, and kernel launches; on a CPU the operators called.

By default a CPU takes --blocks 2 of a model's blocks and leaves its token embedding out (figures
are per parameter; --full takes whole models, one contender at a time, and PyLO on all of them).
--quick: one layer, one allocator, under a minute. Meta-weights are random of the published sizes:
they cost what learned ones do. Writes results/step_<device>.json, or with --quick
results/step_<device>_quick.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_demo import environment, markdown
from torch.utils._python_dispatch import TorchDispatchMode

import pylo_dist
from pylo_dist.core import trace
from pylo_dist.maths import compiled

ROOT = Path(__file__).resolve().parents[1]
Shapes = list[tuple[int, ...]]
TUNED = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_THRESHOLD_": str(1 << 40)}
# phases "kernels: ..." of the package
PASSES = ("gradient_pass", "moment_pass", "feature_pass", "update_pass")
# bytes that the passes move per parameter (float32) and their flops, see csrc/README.md
BYTES = {"small_fc": 72, "velo": 72, "celo2": 72}
FLOPS = {"small_fc": 3200, "velo": 200, "celo2": 500}
# GFLOP/s with two 512-bit fused multiply-adds a cycle; what such a core would take is computed
FAST_CORE = 245.0
COMPUTED = f"computed: ns on a core of {FAST_CORE:g} GFLOP/s at that share"


def transformer(width: int, blocks: int, positions: int, tokens: int) -> Shapes:
    """GPT-2's tensors with tied embeddings."""
    block = [
        (width,),
        (width,),
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
        (width,),
        (width,),
    ]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(tokens, width)] * (tokens > 0) + [
        (positions, width),
        *block * blocks,
        (width,),
        (width,),
    ]


def tensor_lists(blocks: int | None) -> dict[str, Shapes]:
    """The lists; with `blocks`, that many of each model and no token embedding."""
    vit = [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,), (1000, 768), (1000,)]
    return {
        "1000x1000": [(1000, 1000)],
        "GPT-2 124M": transformer(768, blocks or 12, 1024, 0 if blocks else 50257),
        "GPT-2 355M": transformer(1024, blocks or 24, 1024, 0 if blocks else 50257),
        "ViT-B/16": vit + transformer(768, blocks or 12, 1, 0)[1:],
    }


def random_weights(architecture: str) -> Mapping[str, torch.Tensor]:
    """Weights of VeLO's published sizes (LSTM 512, 256 sets of weights), of Celo's (64, 1)."""
    sizes = {"velo": {"H": 512, "P": 256}, "celo": {"H": 64, "P": 1}, "celo_adam": {"H": 64}}
    return pylo_dist.random_weights(architecture, sizes=sizes.get(architecture)).tensors


class Calls(TorchDispatchMode):
    """Counts the operators that are called, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


class PassSeconds:
    """CPU seconds of the compiled passes by name; an observer of the package."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self._seconds = seconds
        self._start = 0.0

    def begin(self, name: str, buffer: torch.Tensor | None) -> None:
        self._start = time.process_time()

    def end(self, name: str) -> None:
        kind, _, work = name.partition(": ")
        if kind == "kernels":  # within which nothing begins
            self._seconds[work].append(time.process_time() - self._start)


class Contender:
    """An optimizer over its own copy of a list of tensors.

    Args:
        kernels: whether the compiled passes are allowed.
    """

    def __init__(
        self,
        name: str,
        shapes: Shapes,
        device: str,
        build: Callable[[Any], Any],
        kernels: bool = True,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape: Sequence[int]) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.name, self.kernels, self.device = name, kernels, device
        self.params = [torch.nn.Parameter(0.02 * normal(shape)) for shape in shapes]
        for p in self.params:
            p.grad = 1e-2 * normal(p.shape)
        self.optimizer = build(self.params)
        self.numel = sum(p.numel() for p in self.params)
        self.loss = torch.tensor(1.0, device=device)
        learned = isinstance(self.optimizer, pylo_dist.LearnedOptimizer) or type(
            self.optimizer
        ).__module__.startswith("pylo.")
        self.arguments = (self.loss,) if learned else ()
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def step(self) -> None:
        with compiled.use_kernels(self.kernels):
            self.optimizer.step(*self.arguments)

    def measure(self) -> None:
        """One step: seconds of it, and of each compiled pass."""
        if self.device != "cpu":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            self.step()
            end.record()
            end.synchronize()
            self.seconds["step"].append(1e-3 * start.elapsed_time(end))
            return
        with trace.observe(PassSeconds(self.seconds)):
            wall, cpu = time.perf_counter(), time.process_time()
            self.step()
            self.seconds["step"].append(time.process_time() - cpu)
            self.seconds["wall"].append(time.perf_counter() - wall)

    def row(self) -> dict[str, float]:
        """Nanoseconds per parameter and the operators called; on a GPU the milliseconds and kernel
        launches of a step.
        """
        row = {
            key: round(1e9 * median(values) / self.numel, 3) for key, values in self.seconds.items()
        }
        if self.device == "cpu":
            with Calls() as calls:
                self.step()
            row["operators"] = calls.count
        elif self.device != "cpu":
            row["ms"] = round(1e3 * median(self.seconds["step"]), 3)
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA]
            ) as profile:
                self.step()
                torch.cuda.synchronize()
            work = [
                e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA
            ]
            row["launches"] = sum(not name.startswith(("Memcpy", "Memset")) for name in work)
        return row


def ours(name: str, precision: str = "high") -> Callable[[Any], Any]:
    makers: dict[str, Callable[[Any], Any]] = {
        "small_fc": lambda p: pylo_dist.AdafacLO(
            p, weights=random_weights("small_fc"), precision=precision
        ),
        "velo": lambda p: pylo_dist.VeLO(
            p, num_steps=100_000, weights=random_weights("velo"), precision=precision
        ),
        "celo2": lambda p: pylo_dist.CELO2(p, weights=random_weights("celo2"), precision=precision),
        "celo2 without Newton-Schulz": lambda p: pylo_dist.CELO2(
            p, weights=random_weights("celo2"), orthogonalize=False
        ),
    }
    return makers[name]


def pylo_makers(folder: str) -> dict[str, Callable[[Any], Any]]:
    """PyLO's plain classes with random weights instead of those on the Hub."""
    sys.path.insert(0, folder)
    import importlib.util
    import types
    import warnings

    # imported by PyLO's package for a class that is not measured here
    if importlib.util.find_spec("mup") is None:
        sys.modules["mup"], sys.modules["mup.optim"] = (
            types.ModuleType("mup"),
            types.ModuleType("mup.optim"),
        )
        sys.modules["mup.optim"].process_param_groups = None  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pylo
    from pylo.models.Meta_MLP import MetaMLP
    from pylo.models.VeLO_MLP import VeLOMLP
    from pylo.models.VeLO_RNN import VeLORNN

    for cls, sizes in ((MetaMLP, (39, 32, 1)), (VeLOMLP, ()), (VeLORNN, ())):
        cls.from_pretrained = classmethod(lambda cls, *args, sizes=sizes, **kwargs: cls(*sizes))
    return {
        "small_fc": lambda p: pylo.AdafacLO_naive(p),
        "velo": lambda p: pylo.VeLO_naive(p, lr=1.0, num_steps=100_000),
    }


def fma_peak() -> Callable[[], float] | None:
    """Work whose float32 operations it gives: chains of fused multiply-adds in registers. None
    without a C++ compiler.
    """
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fma_peak.so"
        flags = ["-O2", "-std=c++17", "-ffp-contract=fast", "-Wno-psabi", "-shared", "-fPIC"]
        source = str(ROOT / "benchmarks" / "fma_peak.cpp")
        if subprocess.run([compiler, *flags, source, "-o", str(path)], check=False).returncode != 0:
            return None
        call = ctypes.CDLL(str(path)).fma_flops
    call.restype, call.argtypes = ctypes.c_double, (ctypes.c_int64, ctypes.POINTER(ctypes.c_float))
    out = ctypes.c_float()
    return lambda: call(1_000_000, ctypes.byref(out))


class Ceilings:
    """What the machine can do, measured beside the steps: float32 operations, and bytes of a
    copy.
    """

    def __init__(self, device: str) -> None:
        n = 1024 if device == "cpu" else 8192
        self.a, self.b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
        self.source = torch.randn((1 << 25) if device == "cpu" else (1 << 29), device=device)
        self.target = torch.empty_like(self.source)
        self.device = device
        self.peak = fma_peak() if device == "cpu" else None
        self.what = "matrix product" if self.peak is None else "fused multiply-adds in registers"
        self.gflops: list[float] = []
        self.gbytes: list[float] = []

    def _seconds(self, work: Callable[[], Any]) -> float:
        if self.device == "cpu":
            start = time.process_time()
            work()
            return time.process_time() - start
        start_event, end_event = (
            torch.cuda.Event(enable_timing=True),
            torch.cuda.Event(enable_timing=True),
        )
        start_event.record()
        work()
        end_event.record()
        end_event.synchronize()
        return 1e-3 * start_event.elapsed_time(end_event)

    def measure(self) -> None:
        done = 2.0 * self.a.shape[0] ** 3
        if self.peak is None:
            seconds = self._seconds(lambda: torch.mm(self.a, self.b))
        else:
            start = time.process_time()
            done = self.peak()
            seconds = time.process_time() - start
        self.gflops.append(1e-9 * done / seconds)
        self.gbytes.append(
            8e-9 * self.source.numel() / self._seconds(lambda: self.target.copy_(self.source))
        )

    def row(self) -> dict[str, Any]:
        return {
            "GFLOP/s": round(median(self.gflops), 1),
            "of": self.what,
            "GB/s": round(median(self.gbytes), 2),
        }

    def shares(self, rule: str, ns: float) -> dict[str, float]:
        """What the passes of a rule reach at that many nanoseconds per parameter, and their shares
        of the ceilings.
        """
        gbytes, gflops = BYTES[rule] / ns, FLOPS[rule] / ns
        row = {"GB/s": round(gbytes, 2), "GFLOP/s": round(gflops, 1)}
        row["share of the copy bandwidth"] = round(gbytes / median(self.gbytes), 3)
        if self.device == "cpu":
            share = gflops / median(self.gflops)
            row["share of the FMA peak"] = round(share, 3)
            row[COMPUTED] = round(FLOPS[rule] / (share * FAST_CORE), 2)
        return row


def contenders(
    args: argparse.Namespace, shapes: Shapes, small: bool
) -> dict[str, Callable[[], Contender]]:
    """Makers of all that take part on a list; the slow ones only where it is small."""
    device = args.device
    found: dict[str, Callable[[], Contender]] = {}

    def add(name: str, build: Callable[[Any], Any], kernels: bool = True) -> None:
        found[name] = partial(Contender, name, shapes, device, build, kernels)

    for rule in ("small_fc", "velo"):
        for precision in ("high",) if device == "cpu" else ("highest", "high", "medium"):
            add(rule if device == "cpu" else f"{rule} {precision}", ours(rule, precision))
    for rule in ("celo2 without Newton-Schulz", "celo2"):
        add(rule, ours(rule))
    add("AdamW foreach", lambda p: torch.optim.AdamW(p, foreach=True))
    add("AdamW fused", lambda p: torch.optim.AdamW(p, fused=True))
    if small or device != "cpu":
        for rule in ("small_fc", "velo"):
            add(f"{rule}, plain PyTorch", ours(rule), kernels=False)
    if args.pylo and (small or args.full):
        for rule, make in pylo_makers(args.pylo).items():
            add(f"{rule}, PyLO naive", make)
    return found


def measure_in_turns(
    makers: Sequence[Callable[[], Contender]], rounds: int, ceilings: Ceilings
) -> dict[str, dict[str, float]]:
    """The rows of some contenders; in every round each takes one step."""
    entries = [make() for make in makers]
    for entry in entries:
        entry.step()  # state, tables and caches
    for _ in range(rounds):
        ceilings.measure()
        for entry in entries:
            entry.measure()
    return {entry.name: entry.row() for entry in entries}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """All lists, in this process. A GPU takes one contender at a time: it is not shared, and its
    memory is dear.
    """
    result: dict[str, Any] = {}
    for name, shapes in tensor_lists(
        None if args.full or args.device != "cpu" else args.blocks
    ).items():
        if (args.only and name not in args.only) or (args.quick and name != "1000x1000"):
            continue
        ceilings, makers = (
            Ceilings(args.device),
            list(contenders(args, shapes, name == "1000x1000").values()),
        )
        rows: dict[str, dict[str, float]] = {}
        for group in (
            [makers] if args.device == "cpu" and not args.full else [[maker] for maker in makers]
        ):
            rows.update(measure_in_turns(group, args.rounds, ceilings))
        for rule, row in rows.items():
            base = rule.split()[0]
            if base in BYTES and "," not in rule and rule != "celo2":
                own = sum(row[p] for p in PASSES if p in row) or row["step"]
                row.update(ceilings.shares(base, own))
        numel = sum(math.prod(shape) for shape in shapes)
        result[name] = {
            "parameters": numel,
            "tensors": len(shapes),
            "ceilings": ceilings.row(),
            "ns_per_parameter": rows,
        }
        print(f"{name}: done", file=sys.stderr, flush=True)
    return result


def threads(args: argparse.Namespace) -> dict[str, float]:
    """Wall clock of one step with 1 thread over that with 2; of a copy too, which is what memory
    has for a second one.
    """
    found = {}
    source = torch.randn(1 << 25)
    target = torch.empty_like(source)

    def stepping(rule: str) -> Callable[[], float]:
        entry = Contender(rule, [(1024, 4096)] * (1 if args.quick else 2), "cpu", ours(rule))

        def measure() -> float:
            entry.seconds.clear()
            entry.measure()
            return entry.seconds["wall"][0]

        return measure

    def copying() -> float:
        start = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - start

    for name, measure in (
        ("small_fc", stepping("small_fc")),
        ("velo", stepping("velo")),
        ("copy", copying),
    ):
        walls: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(2 * args.rounds + 1):
            for count, wall in walls.items():
                torch.set_num_threads(count)
                wall.append(measure())
        found[name] = round(median(walls[1][1:]) / median(walls[2][1:]), 3)
    torch.set_num_threads(1)
    return found


def table(lists: dict[str, Any], device: str) -> str:
    columns = list(lists)
    names = list(
        dict.fromkeys(name for entry in lists.values() for name in entry["ns_per_parameter"])
    )
    key, unit = ("step", "ns per parameter and core") if device == "cpu" else ("ms", "ms per step")
    lines: list[Sequence[str]] = [[unit, *columns]]
    for name in names:
        rows = [lists[column]["ns_per_parameter"].get(name) for column in columns]
        lines.append([name, *("-" if row is None else f"{row[key]:.2f}" for row in rows)])
        passes = [p for p in PASSES if any(row and p in row for row in rows)]
        if passes:
            each = [
                "-" if row is None else " + ".join(f"{row[p]:.2f}" for p in passes if p in row)
                for row in rows
            ]
            lines.append([f"... its passes ({', '.join(p.split('_')[0] for p in passes)})", *each])
    for name in names if device != "cpu" else ():
        rows = [lists[column]["ns_per_parameter"].get(name) for column in columns]
        lines.append(
            [f"{name}, launches", *("-" if row is None else str(row["launches"]) for row in rows)]
        )
    for name in names:
        rows = [lists[column]["ns_per_parameter"].get(name) for column in columns]
        for figure in (
            "share of the FMA peak",
            "share of the copy bandwidth",
            COMPUTED,
            "operators",
        ):
            if any(row and figure in row for row in rows):
                lines.append(
                    [
                        f"{name}, {figure}",
                        *("-" if row is None else str(row.get(figure, "-")) for row in rows),
                    ]
                )
    for figure in ("GFLOP/s", "GB/s"):
        lines.append(
            [f"ceiling, {figure}", *(str(lists[column]["ceilings"][figure]) for column in columns)]
        )
    return markdown(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Time one optimizer step of all rules beside AdamW and PyLO."
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    parser.add_argument("--pylo", help="folder with PyLO's source")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--blocks", type=int, default=2, help="blocks of each model on a CPU")
    parser.add_argument(
        "--full", action="store_true", help="whole models on a CPU, PyLO on all of them"
    )
    parser.add_argument("--only", nargs="+", help="names of lists")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one layer, three rounds, on a CPU one allocator: under a minute",
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.rounds = min(args.rounds, 3)
    torch.set_num_threads(1)
    if args.inner:
        print(json.dumps(compare(args)))
        return 0
    result: dict[str, Any] = {
        "what": "CPU nanoseconds per parameter and core"
        if args.device == "cpu"
        else "device time of a step",
        **environment(),
        "paths": compiled.paths(),
        "rounds": args.rounds,
        "blocks": None if args.full or args.device != "cpu" else args.blocks,
        "quick": args.quick,
    }
    if args.device == "cpu":
        allocators: list[tuple[str, dict[str, str]]] = [
            ("glibc as shipped", {}),
            ("glibc keeping its memory", TUNED),
        ]
        for allocator, variables in allocators[:1] if args.quick else allocators:
            command = [sys.executable, __file__, "--inner", *sys.argv[1:]]
            done = subprocess.run(
                command,
                env={**os.environ, **variables},
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
            result[allocator] = json.loads(done.stdout.splitlines()[-1])
            print(f"\n{allocator}\n\n{table(result[allocator], args.device)}", flush=True)
        result["two_threads_over_one"] = threads(args)
        print(f"\n2 threads against 1, wall clock: {result['two_threads_over_one']}")
    else:
        result["device"] = torch.cuda.get_device_name()
        result["lists"] = compare(args)
        print(table(result["lists"], args.device))
    out = (
        args.out
        or ROOT
        / "benchmarks"
        / "results"
        / f"step_{args.device}{'_quick' if args.quick else ''}.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a step costs the host, beside another checkout: over ranks, tensors and buckets.

    git worktree add ../before COMMIT      # with compiled passes built in it
    python benchmarks/bench_host.py --other ../before

ZeroOptimizer runs as rank 0 of up to 4096 on torch's fake process group, which sends nothing: the
tensors are small, so that what is left is what Python and operators cost. Both builds are alive at
once and take turns. Figures are CPU time of the process, less what torch spends inside the
collectives; ratios are this build / the other, of medians over the turns.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch
import torch._dynamo  # by the first optimizer otherwise, in the middle of its construction
import torch.distributed as dist
import turns
from torch import Tensor, nn

Figures = dict[str, float]
# kind, and what it is of
CASES = (
    *(("zero", "AdafacLO", str(world)) for world in (8, 512, 4096)),
    *(("default", "AdafacLO", str(world)) for world in (8, 512, 4096)),
    ("zero", "CELO2", "4096"),
    ("zero", "AdamW", "512"),
    *(("small", name, "2000") for name in ("AdafacLO", "AdamW")),
    *(("plain", name, str(tensors)) for name in ("AdafacLO", "VeLO") for tensors in (10, 1000)),
    ("plain", "CELO2", "1000"),
    ("plain", "AdamW", "1000"),
    ("deepspeed", "AdafacLO", "2000"),
    ("meet", "late", "4096"),
)


# ------------------------------------------------------------------------------------ in a process


def optimizer_of(name: str) -> tuple[Any, dict[str, Any]]:
    import pylo_dist
    from support.golden import celo2_weights, load, velo_weights

    if name == "AdamW":
        return torch.optim.AdamW, {"foreach": True}
    weights: Any = "demo"
    settings: dict[str, Any] = {"nonfinite": "skip"}
    if name == "VeLO":
        weights, settings = velo_weights("release"), {**settings, "num_steps": 10_000}
    if name == "CELO2":
        weights = celo2_weights(load("celo2_default_f64"))
    face = getattr(pylo_dist, name)
    # read once: what that takes, VeLO's 10 ms, does not grow with the tensors
    network = face([nn.Parameter(torch.zeros(2, 2))], **{**settings, "weights": weights}).weights
    return face, {**settings, "weights": network}


def small_tensors(count: int) -> list[tuple[str, nn.Parameter]]:
    """Of 16 to 64 elements, in four shapes."""
    shapes = ((8, 8), (16,), (4, 16), (2, 4, 8))
    torch.manual_seed(0)
    return [(f"p{i}", nn.Parameter(0.02 * torch.randn(shapes[i % 4]))) for i in range(count)]


class InCollectives:
    """A `trace` observer: CPU seconds inside torch's calls that begin a collective."""

    def __init__(self) -> None:
        self.seconds = self.begun = 0.0

    def begin(self, name: str, buffer: Tensor | None) -> None:
        if name.startswith("collective: "):
            self.begun = time.process_time()

    def end(self, name: str) -> None:
        if name.startswith("collective: "):
            self.seconds += time.process_time() - self.begun


def seconds_outside(work: Callable[[], Any]) -> float:
    """CPU seconds of `work` without those inside collectives."""
    from pylo_dist.core import trace

    watch, begin = InCollectives(), time.process_time()
    with trace.observe(watch):
        work()
    return time.process_time() - begin - watch.seconds


def enter_world(ranks: int, store: Any = None) -> None:
    """Be rank 0 of so many on torch's fake process group, which sends nothing."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  (the backend "fake")

    store = dist.HashStore() if store is None else store
    dist.init_process_group("fake", store=store, rank=0, world_size=ranks)


TENSORS = 580
LIKE_25_MB = 0.25  # of TENSORS tensors in 145 buckets, as 1.5B parameters are in buckets of 25 MB


def default(name: str, world: int) -> Callable[[], Figures]:
    """As `zero`, in as large a share of the tensors per bucket as ZeroOptimizer takes by itself for
    1.5B parameters on so many ranks.
    """
    from pylo_dist.adapters.zero import buckets

    if not hasattr(buckets, "default_cap_mb"):  # a checkout from before: 25 MB on any ranks
        return zero(name, world)
    model_mb, tensors_mb = 6230e6 / 2**20, TENSORS * 128 * 128 * 4 / 2**20
    share = buckets.default_cap_mb(model_mb, world) / model_mb
    return zero(name, world, max(LIKE_25_MB, share * tensors_mb))


def zero(name: str, world: int, cap_mb: float = LIKE_25_MB) -> Callable[[], Figures]:
    """TENSORS tensors in buckets of this size."""
    import pylo_dist

    enter_world(world)
    named = [(f"p{i}", nn.Parameter(torch.zeros(128, 128))) for i in range(TENSORS)]
    kind, settings = optimizer_of(name)

    def build() -> Any:
        return pylo_dist.ZeroOptimizer(named, kind, stage=2, bucket_cap_mb=cap_mb, **settings)

    def step() -> Figures:
        for _, param in named:
            param.grad = torch.zeros_like(param)
        return {"step_ms": 1e3 * seconds_outside(optimizer.step)}

    begin = time.process_time()
    optimizer = build()
    once = {"construct_ms": 1e3 * (time.process_time() - begin)}
    tracemalloc.start()
    another = build()
    once["plans_mb"] = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    del another
    optimizer = build()
    step()
    return lambda: {**once, **step()}


def small(name: str, tensors: int) -> Callable[[], Figures]:
    """Stage 1 on two ranks, of gradients that are on the parameters: microseconds per tensor, AdamW
    fused.
    """
    import pylo_dist

    enter_world(2)
    named = small_tensors(tensors)
    kind, settings = optimizer_of(name)
    settings = {"fused": True} if name == "AdamW" else settings
    optimizer = pylo_dist.ZeroOptimizer(named, kind, **settings)

    def work() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def turn() -> Figures:
        for _, param in named:
            param.grad = torch.zeros_like(param)
        return {"step_us": 1e6 * seconds_outside(work) / tensors}

    turn()
    return turn


def plain(name: str, tensors: int) -> Callable[[], Figures]:
    """Microseconds per tensor."""
    named = small_tensors(tensors)
    for _, param in named:
        param.grad = 1e-2 * torch.randn_like(param)
    kind, settings = optimizer_of(name)
    repeats = max(1, 1000 // tensors)

    def timed(work: Callable[[], Any]) -> float:
        begin = time.process_time()
        for _ in range(repeats):
            work()
        return 1e6 * (time.process_time() - begin) / tensors / repeats

    def step() -> None:
        optimizer.step() if name == "AdamW" else optimizer.step(torch.tensor(1.0))

    optimizer = kind(named, **settings)
    step()

    def turn() -> Figures:
        nonlocal optimizer
        saved = optimizer.state_dict()
        figures = {"step_us": timed(step), "state_dict_us": timed(optimizer.state_dict)}
        figures["load_us"] = timed(lambda: optimizer.load_state_dict(saved))
        step()

        def construct() -> None:
            nonlocal optimizer
            optimizer = kind(named, **settings)

        figures["construct_us"] = timed(construct)
        step()
        return figures

    return turn


def deepspeed(name: str, tensors: int) -> Callable[[], Figures]:
    """One rank, stage 2: the engine's step, and of it what the adapter takes beside the learned
    step inside.
    """
    import deepspeed as ds

    import pylo_dist.deepspeed  # noqa: F401

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tensors = nn.ParameterList(param for _, param in small_tensors(tensors))

        def forward(self) -> Tensor:
            return torch.stack([param.sum() for param in self.tensors]).square().sum()

    dist.init_process_group("gloo")
    params = {"weights": "demo"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": name, "params": params},
        "zero_optimization": {"stage": 2},
    }
    model = Model()
    engine, *_ = ds.initialize(model=model, config=config)
    spent = {"adapter": 0.0, "inner": 0.0}

    def timed(what: str, work: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            begin = time.process_time()
            work()
            spent[what] += time.process_time() - begin

        return call

    adapter = engine.basic_optimizer
    adapter.step = timed("adapter", adapter.step)
    adapter.inner.step = timed("inner", adapter.inner.step)

    def turn() -> Figures:
        engine.backward(engine())
        spent.update(adapter=0.0, inner=0.0)
        begin = time.process_time()
        engine.step()
        return {
            "step_ms": 1e3 * (time.process_time() - begin),
            "adapter_ms": 1e3 * (spent["adapter"] - spent["inner"]),
        }

    turn()
    return turn


class CountedStore(dist.Store):  # type: ignore[misc]
    """A store in this process that counts what is asked of it, in which the others come 1.5 s late
    to every meeting.
    """

    def __init__(self, late: int) -> None:
        super().__init__()
        self.inner, self.late, self.calls = dist.HashStore(), late, 0
        self.set_timeout = self.inner.set_timeout
        self.coming: set[str] = set()

    def _come(self, key: str) -> None:
        if key.endswith("/arrived") and key not in self.coming:
            self.coming.add(key)
            threading.Timer(1.5, self.inner.add, (key, self.late)).start()

    def set(self, key: str, value: str) -> None:
        self.calls += 1
        self.inner.set(key, value)

    def get(self, key: str) -> bytes:
        self.calls += 1
        return bytes(self.inner.get(key))

    def append(self, key: str, value: bytes) -> None:
        self.calls += 1
        # rank 1 alone is late; the others have come as this one does
        here = (0, *range(2, self.late + 1))
        own = value.decode()
        self.inner.append(key, "".join(own.replace("0", str(rank), 1) for rank in here))

    def add(self, key: str, more: int) -> int:
        self.calls += 1
        self._come(key)
        return int(self.inner.add(key, more))

    def check(self, keys: list[str]) -> bool:
        self.calls += 1
        # rank 1 alone is late; the others are here
        return all("/here/" in key and not key.endswith("/1") for key in keys) or bool(
            self.inner.check(keys)
        )

    def compare_set(self, key: str, expected: str, wanted: str) -> bytes:
        self.calls += 1
        return bytes(self.inner.compare_set(key, expected, wanted))


def meet(_: str, world: int) -> Callable[[], Figures]:
    """Calls of the store by one rank that waits 1.5 s for others."""
    from pylo_dist import comm

    store = CountedStore(world - 1)
    enter_world(world, store)

    def turn() -> Figures:
        store.calls = 0
        comm.meet(tuple(range(world)), "the benchmark", ["entry"], 60.0)
        return {"store_calls": float(store.calls)}

    return turn


def worker(kind: str, name: str, count: str) -> None:
    """Every line of standard input is a turn, the answer its figures as JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    makers: dict[str, Callable[[str, int], Callable[[], Figures]]] = {
        "zero": zero,
        "default": default,
        "small": small,
        "plain": plain,
        "deepspeed": deepspeed,
        "meet": meet,
    }
    out, sys.stdout = sys.stdout, sys.stderr  # libraries talk
    turn = makers[kind](name, int(count))
    print("ready", file=out, flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn()), file=out, flush=True)


# --------------------------------------------------------------------------------- of both builds


def measured(case: Sequence[str], other: Path, count: int) -> list[dict[str, Any]]:
    """A row per figure: of both builds, and their ratio."""
    found: list[list[Figures]] = [[], []]
    with turns.both_builds(other, Path(__file__), case) as builds:
        for i in turns.in_turns(1 if case[0] == "meet" else count):
            found[i].append(json.loads(builds[i].ask("turn")[0]))
    kind, name, size = case
    rows = []
    for figure in found[0][0]:
        mine, theirs = (median(turn[figure] for turn in some) for some in found)
        rows.append(
            {
                "case": kind,
                "of": name,
                "ranks_or_tensors": int(size),
                "figure": figure,
                "this": mine,
                "other": theirs,
                "ratio": mine / theirs,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = turns.command_line(
        "Host costs of this checkout beside another's.", 9, record.RESULTS / "host.json"
    )
    args = turns.parsed(parser, argv, worker)
    if args is None:
        return {}
    return turns.write(
        "host costs of ZeroOptimizer on a fake process group (collectives left out), of plain "
        "optimizers and of DeepSpeed's adapter: CPU time of this checkout and another one, in "
        "turns within one run, medians; calls of the store by a rank that waits",
        args,
        {"turns": args.turns},
        CASES,
        lambda case: measured(case, args.other, args.turns),
        ".3g",
    )


if __name__ == "__main__":
    main()

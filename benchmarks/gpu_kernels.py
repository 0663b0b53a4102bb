"""What benchmarks/gpu_check.sh measures beside bench_step.py, on a GPU; prints one JSON object.

python benchmarks/gpu_kernels.py kernels     device time of every kernel of a step of GPT-2 124M,
                                             per rule and precision
python benchmarks/gpu_kernels.py graph       whole steps launched one by one and as a CUDA graph
python benchmarks/gpu_kernels.py parity      PyLO's plain classes against its CUDA classes and
                                             against this package (PYLO_DIR)
python benchmarks/gpu_kernels.py once RULE PRECISION    one step, for a profiler
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from bench_step import pylo_makers, random_weights, tensor_lists

import pylo_dist

RULES: dict[str, Callable[[Any, str], pylo_dist.LearnedOptimizer]] = {
    "small_fc": lambda p, precision: pylo_dist.AdafacLO(
        p, weights=random_weights("small_fc"), precision=precision
    ),
    "velo": lambda p, precision: pylo_dist.VeLO(
        p, num_steps=1000, weights=random_weights("velo"), precision=precision
    ),
    "celo2": lambda p, precision: pylo_dist.CELO2(
        p, weights=random_weights("celo2"), precision=precision
    ),
    "mulo": lambda p, precision: pylo_dist.MuLO(
        p, weights=random_weights("small_fc"), width_mults={}, precision=precision
    ),
    "elo": lambda p, precision: pylo_dist.ELO(
        p, weights=random_weights("elo"), precision=precision
    ),
    "elo_celo2": lambda p, precision: pylo_dist.ELO_CELO2(
        p, weights=random_weights("celo2"), precision=precision
    ),
}
# of the two rules with kernels of their own; the others share them
PRECISIONS = ("highest", "high", "medium")
CASES = [
    (rule, precision)
    for rule in RULES
    for precision in (PRECISIONS if rule in ("small_fc", "velo") else ("high",))
]


def model(name: str = "GPT-2 124M") -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    params = [
        torch.nn.Parameter(0.02 * torch.randn(shape, device="cuda"))
        for shape in tensor_lists(None)[name]
    ]
    for p in params:
        p.grad = 0.01 * torch.randn_like(p)
    return params


def stepped(
    rule: str, precision: str, steps: int
) -> tuple[pylo_dist.LearnedOptimizer, torch.Tensor]:
    optimizer, loss = RULES[rule](model(), precision), torch.tensor(3.0, device="cuda")
    for _ in range(steps):
        optimizer.step(loss=loss)
    torch.cuda.synchronize()
    return optimizer, loss


def kernels() -> dict[str, Any]:
    table: dict[str, Any] = {}
    for rule, precision in CASES:
        optimizer, loss = stepped(rule, precision, 3)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(5):
                optimizer.step(loss=loss)
            torch.cuda.synchronize()
        rows = {
            e.key: (e.count / 5, e.self_device_time_total / 5000)
            for e in profile.key_averages()
            if e.self_device_time_total
        }
        ours = {
            key.split("(")[0].replace("void ", ""): time
            for key, (_, time) in rows.items()
            if "pylo_dist" in key
        }
        table[f"{rule} {precision}"] = {
            "ms of each kernel": {
                key: round(time, 4) for key, time in sorted(ours.items(), key=lambda row: -row[1])
            },
            "launches of the passes": sum(
                count for key, (count, _) in rows.items() if "pylo_dist" in key
            ),
            "launches in all": sum(count for count, _ in rows.values()),
            "ms in all": round(sum(time for _, time in rows.values()), 4),
        }
    return table


def milliseconds(work: Callable[[], Any], rounds: int = 20) -> float:
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(median(times), 4)


def graph() -> dict[str, Any]:
    """Whole steps, launched one by one and replayed; the rate and the loss are tensors that a graph
    reads anew.
    """
    table = {}
    for rule, precision in CASES:
        optimizer, loss = stepped(rule, precision, 2)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device="cuda")
        optimizer.step(loss=loss)
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            optimizer.step(loss=loss)
        launched = milliseconds(lambda optimizer=optimizer, loss=loss: optimizer.step(loss=loss))
        table[f"{rule} {precision}"] = {
            "launched, ms": launched,
            "replayed, ms": milliseconds(captured.replay),
        }
    return table


def parity() -> dict[str, Any]:
    """Relative L2 difference of the parameters' change after three steps on the same gradients and
    weights.
    """
    folder = os.environ["PYLO_DIR"]
    makers = pylo_makers(folder)
    import pylo

    shapes = [(64, 96), (96, 64), (130,), (1000, 1000)]
    torch.manual_seed(1)
    start = [0.02 * torch.randn(shape, device="cuda") for shape in shapes]
    grads = [[torch.randn(shape, device="cuda") for shape in shapes] for _ in range(3)]

    def change(make: Callable[[Any], Any]) -> torch.Tensor:
        params = [torch.nn.Parameter(p.clone()) for p in start]
        torch.manual_seed(2)  # the random weights of all classes are the same
        optimizer = make(params)
        for step in grads:
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
            optimizer.step(torch.tensor(1.0, device="cuda"))
        return torch.cat([(p.detach() - q).flatten() for p, q in zip(params, start, strict=True)])

    table: dict[str, Any] = {}
    for rule, plain_class, cuda_name in (
        ("small_fc", "AdafacLO_naive", "AdafacLO_CUDA"),
        ("velo", "VeLO_naive", "VeLO_CUDA"),
    ):
        try:
            plain = change(makers[rule])
            cuda_class = getattr(pylo, cuda_name)
            extra = {} if rule == "small_fc" else {"lr": 1.0, "num_steps": 100_000}
            other = change(lambda p, cuda_class=cuda_class, extra=extra: cuda_class(p, **extra))
            table[f"{plain_class} against {cuda_name}"] = float(
                (plain - other).norm() / plain.norm()
            )
        except Exception as error:
            # what PyLO cannot do here is a result, not a failure of this package
            table[f"{plain_class} against {cuda_name}"] = (
                f"not run: {type(error).__name__}: {error}"[:300]
            )
    return table


def main() -> int:
    if sys.argv[1] == "once":
        stepped(sys.argv[2], sys.argv[3], 2)
        return 0
    print(json.dumps({"kernels": kernels, "graph": graph, "parity": parity}[sys.argv[1]]()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

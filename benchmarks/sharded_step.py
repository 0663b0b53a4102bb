"""The optimizer's step alone on several ranks: ours sharded, the same replicated, and how others
deal the work out.

Used by seed_figures.py; by itself it compares rules alone, ours and replicated:

    python benchmarks/sharded_step.py --rules VeLO Celo --width 128 --blocks 12 --ranks 1 4

Every contender steps the same tensors with the same gradients, averaged
already; its step is timed with the publication of parameters. The exchange of gradients is left
out: an all-reduce where whole tensors are dealt out or all is replicated, a reduce-scatter, half of
that, where tensors are cut.

    replicated        every rank steps everything: plain optimizers under DDP
    ours              ZeroOptimizer, stage 1
    whole tensors     by shape: tensors of one shape are dealt round robin, each kind beginning with
                      rank 0, and their owners broadcast them. The rule of the script behind PyLO's
                      published runs, from its description
    torch             ZeroRedundancyOptimizer: whole tensors, the largest first, to the rank with
                      the least
    Dion              Muon of microsoft/dion, from a folder you name: whole tensors by shape,
                      all-gathers
    PyLO              its plain classes, from a folder you name, replicated: a run of their own,
                      with an eighth of the tensors
    JAX               google/learned_optimization's small_fc on one device, where it is installed

Whole tensors are exact for rules that look at one tensor at a time, so VeLO is not dealt out. After
the steps the contenders with a rule's own weights are compared with the replicated run.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from bench_step import pylo_makers, transformer
from record import RESULTS, environment, markdown, write
from torch import Tensor, nn
from trainees import Stopwatch, device_of, on_ranks, optimizer_of

import pylo_dist
from pylo_dist.weights import load_weights

Shape = tuple[int, ...]


# ------------------------------------------------------------------------------------------ dealing


def deal_by_shape(shapes: Sequence[Shape], ranks: int) -> list[int]:
    """The owner of every tensor: those of one shape round robin, each kind beginning with rank
    0.
    """
    seen: dict[Shape, int] = defaultdict(int)
    owners = []
    for shape in shapes:
        owners.append(seen[shape] % ranks)
        seen[shape] += 1
    return owners


def deal_largest_first(shapes: Sequence[Shape], ranks: int) -> list[int]:
    """The owner of every tensor: the largest first, to the rank with the least."""
    owners, loads = [0] * len(shapes), [0] * ranks
    for i in sorted(range(len(shapes)), key=lambda i: -math.prod(shapes[i])):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += math.prod(shapes[i])
    return owners


def balance(shapes: Sequence[Shape], owners: Sequence[int], ranks: int) -> float:
    """Elements of the rank with the most over their mean."""
    loads = [0] * ranks
    for shape, owner in zip(shapes, owners, strict=True):
        loads[owner] += math.prod(shape)
    return max(loads) / (sum(loads) / ranks)


def computed_balance(ranks: Sequence[int] = (2, 4, 8, 64)) -> list[dict[str, Any]]:
    """Of GPT-2's tensors, from shapes alone."""
    rows = []
    for model, width, blocks in (("124m", 768, 12), ("355m", 1024, 24), ("1.5b", 1600, 48)):
        shapes = transformer(width, blocks, 1024, 50257)
        for world in ranks:
            rows.append(
                {
                    "computed": True,
                    "model": model,
                    "ranks": world,
                    "whole tensors by shape": round(
                        balance(shapes, deal_by_shape(shapes, world), world), 3
                    ),
                    "whole tensors, largest first": round(
                        balance(shapes, deal_largest_first(shapes, world), world), 3
                    ),
                    "flat shards": 1.0,  # but for padding, 16 elements per bucket and rank at most
                }
            )
    return rows


# --------------------------------------------------------------------------------------- contenders


class Tensors(nn.Module):
    """A list of tensors as a model, and their gradients. Alike on all ranks."""

    def __init__(self, shapes: Sequence[Shape], device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.list = nn.ParameterList(
            nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(device))
            for shape in shapes
        )
        self.grads = [
            (1e-2 * torch.randn(shape, generator=generator)).to(device) for shape in shapes
        ]
        self.loss = torch.tensor(1.0, device=device)

    def backward(self) -> None:
        """Give every parameter its gradient by a real backward pass, for what hooks into it."""
        loss = sum((p * g).sum() for p, g in zip(self.list, self.grads, strict=True))
        loss.backward()  # type: ignore[union-attr]

    def values(self) -> list[Tensor]:
        return [p.detach() for p in self.list]


class Entry:
    """A contender on this rank: its tensors, what brings the gradients, its step, and how many
    elements it moves.
    """

    def __init__(self, shapes: Sequence[Shape], device: torch.device) -> None:
        self.tensors = Tensors(shapes, device)
        self.elements = sum(p.numel() for p in self.tensors.list)
        self.rule: str | None = None  # whose replicated run it must equal

    def bring_gradients(self) -> None:
        for p, g in zip(self.tensors.list, self.tensors.grads, strict=True):
            p.grad = g

    def step(self) -> None:
        raise NotImplementedError


class Replicated(Entry):
    """A plain optimizer. `make`: from parameters."""

    def __init__(
        self,
        shapes: Sequence[Shape],
        device: torch.device,
        make: Callable[[Any], Any],
        with_loss: bool,
    ) -> None:
        super().__init__(shapes, device)
        self.optimizer = make(list(self.tensors.list))
        self._arguments = (self.tensors.loss,) if with_loss else ()

    def step(self) -> None:
        self.optimizer.step(*self._arguments)


class Ours(Entry):
    """Under ZeroOptimizer; the gradients are there when the step begins, the parameters when it
    ends.
    """

    def __init__(self, shapes: Sequence[Shape], device: torch.device, name: str) -> None:
        super().__init__(shapes, device)
        kind, arguments = optimizer_of(name)
        self.rule, self._learned = name, issubclass(kind, pylo_dist.LearnedOptimizer)
        self.optimizer = pylo_dist.ZeroOptimizer(self.tensors, kind, stage=1, **arguments)
        self.elements = sum(
            bucket.elements_of(dist.get_rank()) for bucket in self.optimizer.buckets
        )

    def bring_gradients(self) -> None:
        self.optimizer.zero_grad()
        self.tensors.backward()

    def step(self) -> None:
        if self._learned:
            self.optimizer.step(self.tensors.loss)
        else:
            self.optimizer.step()
        self.tensors.state_dict()  # waits for all parameters


class WholeTensors(Entry):
    """AdafacLO on the tensors dealt to this rank, then a broadcast of each."""

    def __init__(self, shapes: Sequence[Shape], device: torch.device) -> None:
        super().__init__(shapes, device)
        self.rule = "AdafacLO"
        self._owners = deal_by_shape(shapes, dist.get_world_size())
        own = [
            p
            for p, owner in zip(self.tensors.list, self._owners, strict=True)
            if owner == dist.get_rank()
        ]
        self.elements = sum(p.numel() for p in own)
        kind, arguments = optimizer_of("AdafacLO")
        self._optimizer = kind(own, **arguments) if own else None

    @torch.no_grad()
    def step(self) -> None:
        if self._optimizer is not None:
            self._optimizer.process_group = False
            self._optimizer.step()
        works = [
            dist.broadcast(p, owner, async_op=True)
            for p, owner in zip(self.tensors.list, self._owners, strict=True)
        ]
        for work in works:
            work.wait()


class Torch(Entry):
    """torch's ZeroRedundancyOptimizer."""

    def __init__(self, shapes: Sequence[Shape], device: torch.device, name: str) -> None:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        super().__init__(shapes, device)
        kind, arguments = optimizer_of(name)
        self.rule = name
        self.optimizer = ZeroRedundancyOptimizer(self.tensors.parameters(), kind, **arguments)
        self.elements = sum(
            p.numel() for group in self.optimizer.optim.param_groups for p in group["params"]
        )

    def step(self) -> None:
        self.optimizer.step()


class Dion(Entry):
    """Muon of microsoft/dion; AdamW for what is no matrix. Its compiler runs at the first step."""

    def __init__(self, shapes: Sequence[Shape], device: torch.device, folder: str) -> None:
        if folder not in sys.path:
            sys.path.insert(0, folder)
        from dion import Muon

        super().__init__(shapes, device)
        matrices = [p for p in self.tensors.list if p.dim() == 2]
        others = [p for p in self.tensors.list if p.dim() != 2]
        self.optimizer = Muon(
            [{"params": matrices}, {"params": others, "algorithm": "adamw"}],
            distributed_mesh=dist.group.WORLD,
            lr=0.01,
        )
        owners = deal_by_shape([tuple(p.shape) for p in matrices], dist.get_world_size())
        mine = sum(
            p.numel() for p, owner in zip(matrices, owners, strict=True) if owner == dist.get_rank()
        )
        self.elements = mine + sum(p.numel() for p in others)

    def step(self) -> None:
        self.optimizer.step()


@dataclass(frozen=True, slots=True)
class Settings:
    """What all ranks must know. `pylo`, `dion`: folders with their source; `alone`: no contenders
    but the rules. By default 3 in 10 elements are the embedding's, as in GPT-2 124M, with the
    default width and blocks of seed_figures.py."""

    width: int
    blocks: int
    rounds: int
    pylo: str | None = None
    dion: str | None = None
    positions: int = 64
    vocabulary: int = 5504
    rules: tuple[str, ...] = ("AdafacLO", "VeLO")
    alone: bool = False

    def shapes(self) -> list[Shape]:
        return transformer(self.width, self.blocks, self.positions, self.vocabulary)

    def beside_pylo(self, pylo: str) -> Settings:
        """An eighth of it, for the learned rules alone: PyLO's plain classes on every rank take
        minutes for the whole.
        """
        width, blocks, vocabulary = (
            max(1, n // d) for n, d in ((self.width, 2), (self.blocks, 2), (self.vocabulary, 4))
        )
        return replace(
            self, width=width, blocks=blocks, vocabulary=vocabulary, pylo=pylo, dion=None
        )


def replicated(shapes: Sequence[Shape], device: torch.device, name: str) -> Replicated:
    kind, arguments = optimizer_of(name)
    learned = issubclass(kind, pylo_dist.LearnedOptimizer)
    if learned:
        arguments = {**arguments, "process_group": False}  # the loss is alike on all ranks
    entry = Replicated(shapes, device, lambda params: kind(params, **arguments), with_loss=learned)
    entry.rule = name
    return entry


def makers(
    settings: Settings, device: torch.device
) -> tuple[dict[str, Callable[[], Entry]], dict[str, str]]:
    """What makes each contender by name, and why some are absent."""
    shapes, absent = settings.shapes(), {}
    found: dict[str, Callable[[], Entry]] = {}
    rules_only = settings.alone or settings.pylo is not None
    for name in (*settings.rules, *([] if rules_only else ["AdamW"])):
        found[f"{name}, replicated"] = lambda name=name: replicated(shapes, device, name)
        found[f"{name}, ours"] = lambda name=name: Ours(shapes, device, name)
    if settings.pylo is not None:
        for name, make in pylo_makers(settings.pylo).items():
            found[f"{name}, PyLO naive, replicated"] = lambda make=make: Replicated(
                shapes, device, make, with_loss=True
            )
    if rules_only:
        return found, absent
    absent["small_fc and velo, PyLO naive, replicated"] = (
        "in a smaller run, where a folder with PyLO's source is named (--pylo)"
    )
    found["AdafacLO, whole tensors by shape"] = lambda: WholeTensors(shapes, device)
    for name in ("AdafacLO", "AdamW"):
        found[f"{name}, torch ZeroRedundancyOptimizer"] = lambda name=name: Torch(
            shapes, device, name
        )
    if settings.dion is None:
        absent["Muon, Dion"] = (
            "no folder with microsoft/dion was named (--dion); pip knows no such package"
        )
    else:
        folder = settings.dion
        found["Muon, Dion"] = lambda: Dion(shapes, device, folder)
    return found, absent


# -------------------------------------------------------------------------------------- measurement


def measure_rank(rank: int, world: int, settings: Settings) -> dict[str, Any]:
    """Wall and CPU seconds of every step, elements and values by contender; in turns."""
    warnings.simplefilter("ignore")
    device = device_of(rank)
    watch, (found, absent) = Stopwatch(device), makers(settings, device)
    entries = {name: make() for name, make in found.items()}
    for entry in entries.values():  # state, tables, compilers
        entry.bring_gradients()
        entry.step()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in entries}
    own: dict[str, list[float]] = {name: [] for name in entries}
    names = list(entries)
    for number in range(settings.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            entry = entries[name]
            entry.bring_gradients()
            dist.barrier()
            watch.start()
            begin = time.thread_time()
            entry.step()
            own[name].append(time.thread_time() - begin)
            taken[name].append(watch.stop())
    truths = {
        entry.rule: entry.tensors.values()
        for name, entry in entries.items()
        if name.endswith(", replicated")
    }
    differences = {}
    for name, entry in entries.items():
        if entry.rule is not None and not name.endswith(", replicated"):
            pairs = zip(entry.tensors.values(), truths[entry.rule], strict=True)
            differences[name] = max(float((a - b).abs().max()) for a, b in pairs)
    result = {
        "seconds": taken,
        "own_seconds": own,
        "elements": {name: entry.elements for name, entry in entries.items()},
        "differences": differences,
        "absent": absent,
        "backend": dist.get_backend(),
        "device": str(device),
    }
    del entries, entry
    return result


def measure_runs(rank: int, world: int, cases: Sequence[Settings]) -> list[dict[str, Any]]:
    return [measure_rank(rank, world, settings) for settings in cases]


def summarize(world: int, per_rank: Sequence[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """Milliseconds of the slowest rank, CPU milliseconds of the busiest and of the mean rank, and
    there of the thread that steps, without those that send and receive; elements; by contender.
    """
    rows = {}
    for name in per_rank[0]["seconds"]:
        taken = [result["seconds"][name] for result in per_rank]
        wall = [max(wall for wall, _ in steps) for steps in zip(*taken, strict=True)]
        cpu = [median(cpu for _, cpu in steps) for steps in taken]
        elements = [result["elements"][name] for result in per_rank]
        rows[name] = {
            "step_ms": round(1e3 * median(wall), 3),
            "cpu_ms_busiest_rank": round(1e3 * max(cpu), 3),
            "cpu_ms_mean_rank": round(1e3 * fmean(cpu), 3),
            "cpu_ms_own_thread": round(
                1e3 * fmean(median(result["own_seconds"][name]) for result in per_rank), 3
            ),
            "elements_max_over_mean": round(max(elements) / fmean(elements), 4),
            "largest_difference_from_replicated": max(
                (r["differences"].get(name, 0.0) for r in per_rank), default=0.0
            )
            if name in per_rank[0]["differences"]
            else None,
        }
    shapes = settings.shapes()
    return {
        "ranks": world,
        "backend": per_rank[0]["backend"],
        "device": per_rank[0]["device"],
        "tensors": len(shapes),
        "parameters": sum(math.prod(shape) for shape in shapes),
        "rounds": settings.rounds,
        "contenders": rows,
        "absent": per_rank[0]["absent"],
    }


def jax_row(shapes: Sequence[Shape], rounds: int) -> dict[str, Any]:
    """AdafacLO and, in turns with it, the same by google/learned_optimization, compiled by JAX; or
    why there is none.

    Both step the same tensors with the same gradients and weights on one device and are compared at
    the end. JAX takes all cores and PyTorch one, so that on a CPU what compares is their CPU time.
    """
    try:
        import jax
        from learned_optimization.learned_optimizers import adafac_mlp_lopt
    except (ImportError, AttributeError) as error:
        # AttributeError: of versions that do not fit each other
        return {"absent": f"{error}; pip install jax and google/learned_optimization"}
    device = torch.device(
        "cpu" if jax.devices()[0].platform == "cpu" or not torch.cuda.is_available() else "cuda"
    )
    ours, watch = replicated(shapes, device, "AdafacLO"), Stopwatch(device)
    weights = load_weights(optimizer_of("AdafacLO")[1]["weights"])
    layers = [f"network.{name}" for name in ("input", "linear_0", "output")]
    network = {
        f"w{i}": weights.tensors[f"{layer}.weight"].T.numpy() for i, layer in enumerate(layers)
    }
    network |= {f"b{i}": weights.tensors[f"{layer}.bias"].numpy() for i, layer in enumerate(layers)}
    scales = {name: ours.optimizer.param_groups[0][name] for name in ("exp_mult", "step_mult")}
    learned = adafac_mlp_lopt.AdafacMLPLOpt(hidden_size=32, hidden_layers=2, **scales)
    theta = {name: jax.numpy.asarray(offsets) for name, offsets in weights.decays.items()} | {
        "nn": {"~": network}
    }
    optimizer = learned.opt_fn(jax.tree_util.tree_map(jax.numpy.asarray, theta))
    grads = {str(i): jax.numpy.asarray(g.cpu().numpy()) for i, g in enumerate(ours.tensors.grads)}
    state = optimizer.init(
        {str(i): jax.numpy.array(p.cpu().numpy()) for i, p in enumerate(ours.tensors.values())},
        num_steps=10_000,
    )
    update = jax.jit(optimizer.update, donate_argnums=0)
    ours.bring_gradients()
    start = [p.clone() for p in ours.tensors.values()]
    taken: list[list[tuple[float, float]]] = [[], []]
    for _ in range(rounds + 1):  # the first compiles
        watch.start()
        state = jax.block_until_ready(update(state, grads, 1.0))
        taken[0].append(watch.stop())
        time.sleep(0.2)  # its threads free memory after a step, which would count as ours
        watch.start()
        ours.step()
        taken[1].append(watch.stop())
    params = optimizer.get_params(state)
    pairs = [
        (torch.from_numpy(np.array(params[str(i)])), p.cpu())
        for i, p in enumerate(ours.tensors.values())
    ]
    rows = {
        name: {
            "step_ms": round(1e3 * median(wall for wall, _ in times[1:]), 3),
            "cpu_ms": round(1e3 * median(cpu for _, cpu in times[1:]), 3),
        }
        for name, times in zip(("AdafacLO, JAX", "AdafacLO, ours"), taken, strict=True)
    }
    return {
        "device": str(jax.devices()[0]),
        "versions": {"jax": jax.__version__},
        "cpu_ms": "of all threads: JAX takes all cores, PyTorch one",
        "parameters": sum(math.prod(shape) for shape in shapes),
        "steps": rounds + 1,
        "rows": rows,
        "largest_difference_from_ours": max(float((a - b).abs().max()) for a, b in pairs),
        "largest_update": max(
            float((a - b.cpu()).abs().max()) for (_, a), b in zip(pairs, start, strict=True)
        ),
    }


def jax_table(found: dict[str, Any]) -> str:
    lines = [["step alone, one device", "wall clock, ms", "CPU, ms"]]
    lines += [
        [name, f"{row['step_ms']:.1f}", f"{row['cpu_ms']:.1f}"]
        for name, row in found["rows"].items()
    ]
    where = f"JAX {found['versions']['jax']} on {found['device']}"
    return f"### {where}, {found['parameters']:,} parameters\n\n{markdown(lines)}"


def table(run: dict[str, Any]) -> str:
    lines = [
        [
            "step alone",
            "slowest rank, ms",
            "CPU of the busiest rank, ms",
            "of the mean rank, ms",
            "of its stepping thread, ms",
            "elements, max / mean",
        ]
    ]
    for name, row in run["contenders"].items():
        numbers = [
            f"{row[key]:.1f}"
            for key in ("step_ms", "cpu_ms_busiest_rank", "cpu_ms_mean_rank", "cpu_ms_own_thread")
        ]
        lines.append([name, *numbers, f"{row['elements_max_over_mean']:.2f}"])
    return f"### {run['ranks']} ranks, {run['parameters']:,} parameters\n\n{markdown(lines)}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare rules, sharded and replicated.")
    parser.add_argument("--rules", nargs="+", default=["VeLO", "Celo", "CeloAdam"])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "sharded_rules.json")
    args = parser.parse_args()
    case = Settings(args.width, args.blocks, args.rounds, rules=tuple(args.rules), alone=True)
    result: dict[str, Any] = {
        "what": "the step alone, gradients given; seconds of CPU compare, also on a busy machine",
        **environment(),
        "runs": [
            summarize(world, [of_cases[0] for of_cases in per_rank], case)
            for world, per_rank in on_ranks(args.ranks, measure_runs, [case])
        ],
    }
    for run in result["runs"]:
        print(f"\n{table(run)}", flush=True)
    write(result, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What weights train to: learned optimizers at their defaults beside tuned AdamW and Muon; write
results/quality.json, a run at a time, and print its tables.

    python benchmarks/bench_quality.py --weights FOLDER     all that is not there yet; hours
    python benchmarks/bench_quality.py --only "bytes, 300 steps" "seed 0"
    python benchmarks/bench_quality.py --table              of what is there; trains nothing

FOLDER holds celo2.safetensors and celo.safetensors, whose numbers are no part of this repository.
A run is one task, number of steps, optimizer, rate and seed. It is written as it ends, so what was
interrupted goes on with the next call; a run of other settings or weights is done again.

Nothing of the learned optimizers is tuned: their default lr and, where they plan, the length of the
run. CELO2, which plans nothing, runs at a constant lr, and under the schedule of the others too.
AdamW and Muon: linear warm-up over a twentieth of the steps, cosine to a tenth, weight decay 0.1 on
matrices; the best rate is chosen by the very losses that are shown, which favours them: those of
the first seed, and the other seeds run at the best alone. Muon takes hidden matrices, AdamW the
rest, under one rate ("match_rms_adamw" of torch.optim.Muon). For each seed all see the same initial
parameters, the same samples in the same order, and the same held-out samples.

Times are CPU seconds of one thread in forward, backward and step; validation is left out. Muon
multiplies bfloat16 matrices; a run says whether those are the CPU's own products or, where it has
none, float32's.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from bench_demo import options_of
from glyphs import CLASSES, SIZE, Glyphs
from learner import Named, by_decay, try_out
from loop import Diverged, train
from model import GPT, build
from options import Options
from place import Place
from presets import EMBEDDINGS
from quality import final, key, report, wanted
from record import RESULTS, environment, write
from run import open_data
from seed_figures import ViT
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from watch import Row

import pylo_dist

SEEDS = (0, 1, 2)  # none of those that the demo weights were calibrated on
EVALUATIONS = 10  # of a run, evenly
DECAY = 0.1  # of AdamW and Muon

# ------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained, and for how long.

    Attributes:
        flags: of launch/gpt2.py; for images those of batches alone mean something.
        model: of a seed, the model before its first step.
        loss: mean loss of the model on what `data` reads, an array of samples.
        data: (training, held out).
        embeddings: in their names; CELO2 and Muon leave these tensors to AdamW.
    """

    name: str
    what: str
    steps: int
    flags: Mapping[str, Any]
    model: Callable[[Options], nn.Module]
    loss: Callable[[nn.Module, np.ndarray], Tensor]
    data: Callable[[Options, Place], tuple[Any, Any]]
    embeddings: str

    def __str__(self) -> str:
        return f"{self.name}, {self.steps} steps"

    def is_hidden(self, name: str) -> bool:
        """Whether a matrix stands between others: no embedding, no output layer."""
        return not (re.search(self.embeddings, name) or name.startswith("head."))


def gpt(options: Options) -> GPT:
    return build(options.config(), options.seed)


def text_loss(model: nn.Module, windows: np.ndarray) -> Tensor:
    """Nats per byte of windows (n, tokens + 1)."""
    tokens = torch.from_numpy(windows)
    loss: Tensor = model(tokens[:, :-1], tokens[:, 1:])[1]
    return loss


def vit(width: int, blocks: int) -> Callable[[Options], ViT]:
    def seeded(options: Options) -> ViT:
        torch.manual_seed(options.seed)
        return ViT(width, blocks, 4, size=SIZE, patch=4, channels=1, classes=len(CLASSES))

    return seeded


def image_loss(model: nn.Module, rows: np.ndarray) -> Tensor:
    """Nats per image of rows (n, 1 + pixels), see `Glyphs.read`."""
    images = torch.from_numpy(rows[:, 1:]).float().div_(128).sub_(0.3)
    return nn.functional.cross_entropy(
        model(images.view(-1, 1, SIZE, SIZE)), torch.from_numpy(rows[:, 0]).long()
    )


def glyphs(train: int, held_out: int) -> Callable[[Options, Place], tuple[Glyphs, Glyphs]]:
    return lambda options, place: (Glyphs(train, 0), Glyphs(held_out, 1))


def bytes_task(name: str, what: str, steps: int, **flags: Any) -> Task:
    return Task(name, what, steps, flags, gpt, text_loss, open_data, EMBEDDINGS)


MICRO = "byte-level GPT-2 of 0.84M parameters (preset micro), 4 x 128 bytes a step, built-in text"
IMAGES = Task(
    "glyphs",
    "vision transformer of 0.21M parameters, 4 blocks, 64 channels, 4 x 4 patches; 16 images a "
    "step of 32768, 24 x 24 pixels, 62 digits and letters in 8 fonts, distorted and noisy",
    1000,
    {"batch_size": 16},
    vit(64, 4),
    image_loss,
    glyphs(1 << 15, 1 << 12),
    r"^(patches|cls|positions)\b",
)
TASKS = (
    bytes_task("bytes", MICRO, 300, preset="micro", batch_size=4),
    IMAGES,
    bytes_task("bytes", MICRO, 1000, preset="micro", batch_size=4),
    bytes_task(
        "wide bytes",
        "GPT-2 as in the other bytes, with 256 channels in place of 128, 3.3M parameters",
        1000,
        preset="micro",
        batch_size=4,
        n_embd=256,
    ),
    bytes_task("bytes", MICRO, 3000, preset="micro", batch_size=4),
)
# for tests: the way through the code and little else
QUICK = (
    bytes_task("bytes", "of a test", 4, preset="nano", batch_size=2, block_size=16),
    replace(
        IMAGES,
        what="of a test",
        steps=4,
        flags={"batch_size": 2},
        model=vit(16, 1),
        data=glyphs(32, 16),
    ),
)

# -------------------------------------------------------------------------------------- optimizers


class RoundedProducts(TorchFunctionMode):
    """Inside, products of bfloat16 matrices are float32 products, rounded once: as of a CPU with
    instructions for them, about. On one without, torch's own take thirty times as long, most of a
    run of Muon.
    """

    NAMES = frozenset(("__matmul__", "matmul", "addmm"))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.NAMES and args[0].dtype is torch.bfloat16:
            return func(*(x.float() for x in args), **(kwargs or {})).bfloat16()
        return func(*args, **(kwargs or {}))


@lru_cache
def has_bfloat16_products() -> bool:
    """Whether this CPU multiplies bfloat16 matrices about as fast as those of float32."""

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(128, 128, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.process_time()
            torch.mm(x, x)
            times.append(time.process_time() - start)
        return min(times)

    return seconds(torch.bfloat16) < 4 * seconds(torch.float32)


class MuonAndAdamW:
    """torch.optim.Muon for hidden matrices and AdamW for the rest, as one optimizer of the
    parameters `named`.
    """

    def __init__(self, named: Named, lr: float, task: Task) -> None:
        hidden = [(n, p) for n, p in named if p.ndim == 2 and task.is_hidden(n)]
        names = {n for n, _ in hidden}
        self._parts = (
            torch.optim.Muon(hidden, lr=lr, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
            adamw([(n, p) for n, p in named if n not in names], lr, task),
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self._parts for group in part.param_groups]

    def step(self) -> None:
        muon, others = self._parts
        with nullcontext() if has_bfloat16_products() else RoundedProducts():
            muon.step()
        others.step()

    def zero_grad(self) -> None:
        for part in self._parts:
            part.zero_grad()


def adamw(named: Named, lr: float, _: Task) -> torch.optim.AdamW:
    return torch.optim.AdamW(by_decay(named, DECAY), lr=lr, betas=(0.9, 0.95))


LEARNED: dict[str, dict[str, Any]] = {
    "CELO2": {"optimizer": "celo2", "weights": "celo2.safetensors", "schedule": "cosine"},
    "CELO2, constant": {"optimizer": "celo2", "weights": "celo2.safetensors"},
    "Celo": {"optimizer": "celo", "weights": "celo.safetensors"},
    "AdafacLO, demo": {"optimizer": "adafaclo", "weights": "demo"},
}
RATES = {"AdamW": (3e-4, 1e-3, 3e-3, 1e-2), "Muon": (1e-3, 3e-3, 1e-2)}
CONTENDERS: dict[str, dict[str, Any]] = {
    **LEARNED,
    **{
        f"{name} {lr:g}": {"optimizer": name.lower(), "lr": lr, "schedule": "cosine"}
        for name, rates in RATES.items()
        for lr in rates
    },
}


class Pupil:
    """A task's model and its optimizer: what `loop.train` calls of a `learner.Trainable`, with its
    CPU time counted.

    Attributes:
        spent: CPU seconds so far, by what they went into: "model" or "optimizer".
    """

    def __init__(self, task: Task, options: Options, *, muon: bool) -> None:
        self._task = task
        self.model = task.model(options)
        named, entry = list(self.model.named_parameters()), options.chosen().entry
        self._learned = entry is not None
        self.optimizer: Any
        if entry is not None:
            arguments = options.learned_arguments()
            if "embedding_pattern" in arguments:
                arguments["embedding_pattern"] = task.embeddings
            self.optimizer = entry.face(named, **arguments)
        else:
            kind = MuonAndAdamW if muon else adamw
            self.optimizer = kind(named, options.base_lr(), task)
        self.spent = {"model": 0.0, "optimizer": 0.0}

    @contextmanager
    def _counted(self, part: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.spent[part] += time.process_time() - start

    def loss(self, windows: np.ndarray) -> Tensor:
        with self._counted("model") if torch.is_grad_enabled() else nullcontext():
            return self._task.loss(self.model, windows)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        with self._counted("model"):
            loss.backward()

    def step(self, loss: Tensor) -> None:
        with self._counted("optimizer"):
            try:
                self.optimizer.step(*((loss,) if self._learned else ()))
            except pylo_dist.NonFiniteGradientError as error:
                raise FloatingPointError(str(error)) from None
        self.optimizer.zero_grad()


# -------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True, slots=True)
class Run:
    """One training run.

    Attributes:
        name: one of CONTENDERS; flags: its own, with the digest of its weights.
    """

    task: Task
    name: str
    flags: Mapping[str, Any]
    seed: int

    def __str__(self) -> str:
        return f"{self.task}, {self.name}, seed {self.seed}"

    def asked(self) -> dict[str, Any]:
        """Flags of launch/gpt2.py, for JSON: all that the result depends on, with weights by the
        name of their file and their digest, and "muon", which is no optimizer there.
        """
        steps = self.task.steps
        return {
            **self.task.flags,
            **self.flags,
            "warmup": steps // 20 if "schedule" in self.flags else 0,
            "steps": steps,
            "eval_every": max(1, steps // EVALUATIONS),
            "eval_batches": 16,
            "seed": self.seed,
        }

    def options(self, weights: Path | None) -> Options:
        """Of launch/gpt2.py; `weights`: the folder of files."""
        flags = {**self.asked(), "device": "cpu", "threads": 1}
        flags.pop("digest", None)
        if flags["optimizer"] == "muon":
            flags["optimizer"] = "adamw"
        if weights is not None and flags.get("weights", "demo") != "demo":
            flags["weights"] = weights / flags["weights"]
        return options_of(**flags)


class Curve:
    """What `loop.train` reports, by step: held-out losses, the mean of the training losses since
    the one before, and the CPU seconds until then.
    """

    def __init__(self, pupil: Pupil) -> None:
        self._pupil = pupil
        self.steps = 0
        self._losses: list[float] = []
        self.val_loss: dict[str, float] = {}
        self.train_loss: dict[str, float] = {}
        self.cpu_s: dict[str, float] = {}

    def add(self, row: Row) -> None:
        if row.val_loss is not None and not math.isfinite(row.val_loss):
            raise Diverged(f"the held-out loss is {row.val_loss} at step {row.step}")
        self.steps = row.step
        self._losses.append(row.loss)
        if row.val_loss is None:
            return
        self.val_loss[str(row.step)] = round(row.val_loss, 4)
        self.train_loss[str(row.step)] = round(mean(self._losses), 4)
        self._losses.clear()
        self.cpu_s[str(row.step)] = round(sum(self._pupil.spent.values()), 2)


def measure(run: Run, weights: Path | None) -> dict[str, Any]:
    """Train and validate; what JSON holds of it."""
    options = run.options(weights)
    torch.set_num_threads(1)
    place = Place.find(options)
    muon = run.flags["optimizer"] == "muon"
    pupil = Pupil(run.task, options, muon=muon)
    curve = Curve(pupil)
    diverged: int | None = None
    try:
        train(pupil, run.task.data(options, place), options, place, options.plan(1), curve)
    except Diverged:
        diverged = curve.steps + 1
    return {
        "task": str(run.task),
        "name": run.name,
        "seed": run.seed,
        "asked": run.asked(),
        "lr": options.base_lr(),
        "val_loss": curve.val_loss,
        "train_loss": curve.train_loss,
        "cpu_s": curve.cpu_s,
        "optimizer_share": round(pupil.spent["optimizer"] / sum(pupil.spent.values()), 3),
        "diverged_at": diverged,
        **({"bfloat16_products": "own" if has_bfloat16_products() else "float32"} if muon else {}),
    }


def at_hand(
    contenders: Mapping[str, Mapping[str, Any]], task: Task, weights: Path | None
) -> dict[str, dict[str, Any]]:
    """Flags by name, with the digests of weights; `task`: any that they train. Of optimizers whose
    weights are not in the folder `weights` a line.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, flags in contenders.items():
        file = flags.get("weights", "demo")
        if file != "demo" and not (weights and (weights / file).is_file()):
            where = f"in {weights}" if weights else "given: --weights FOLDER"
            print(f"{name}: skipped, no {file} {where}", file=sys.stderr)
            continue
        found[name] = dict(flags)
        if "weights" in flags:
            options = Run(task, name, flags, 0).options(weights)
            tried = try_out(options.chosen().entry.face, options.learned_arguments())
            found[name]["digest"] = tried["hash"]
    return found


def runs(tasks: Sequence[Task], seeds: Sequence[int], weights: Path | None) -> list[Run]:
    """All that can be run, in order: a task, a seed, an optimizer."""
    contenders = at_hand(CONTENDERS, tasks[0], weights)
    return [
        Run(task, name, flags, seed)
        for task in tasks
        for seed in seeds
        for name, flags in contenders.items()
    ]


def chosen(todo: Sequence[Run], words: Sequence[str]) -> list[Run]:
    """Those whose names hold all of these words."""
    return [run for run in todo if all(word in str(run) for word in words)]


# ----------------------------------------------------------------------------------------- results


def records(out: Path) -> dict[str, dict[str, Any]]:
    """What was run so far, by `key`."""
    if not out.is_file():
        return {}
    return {key(record): record for record in json.loads(out.read_text()).get("runs", ())}


@dataclass(frozen=True, slots=True)
class Ledger:
    """A JSON of runs, to which every run is added as it ends.

    Attributes:
        head: what stands before the runs, with `environment()`: the commit that is measured.
        order: of tasks and names; what is not among them is not kept.
    """

    out: Path
    head: Mapping[str, Any]
    order: Sequence[tuple[str, str]]

    @property
    def where(self) -> dict[str, str]:
        """What is noted of each run: others may have been done elsewhere."""
        return {
            "commit": self.head["commit"],
            "cpu": self.head["hardware"]["cpu"],
            "torch": self.head["versions"]["torch"],
        }

    def go_on(
        self,
        todo: Sequence[Run],
        weights: Path | None,
        is_wanted: Callable[[Run, Sequence[dict[str, Any]]], bool] = lambda *_: True,
    ) -> None:
        """Train what is not there, or with other settings.

        Args:
            is_wanted: of a run, and what there is of its task by then.
        """
        for i, run in enumerate(todo):
            known = records(self.out)
            if not is_wanted(run, [r for r in known.values() if r["task"] == str(run.task)]):
                continue
            if str(run) in known and known[str(run)]["asked"] == run.asked():
                continue
            new = {**measure(run, weights), "measured": self.where}
            self.add(new)
            print(
                f"{i + 1} of {len(todo)}: {run}: {final(new):.4f}, "
                f"{list(new['cpu_s'].values())[-1:]} CPU s",
                file=sys.stderr,
                flush=True,
            )

    def adopt(self, todo: Sequence[Run], others: Path) -> None:
        """Take over what the ledger `others` has of these runs, if its settings were the same."""
        own, known = records(self.out), records(others)
        for run in todo:
            found = None if str(run) in own else known.get(str(run))
            if found is not None and found["asked"] == run.asked():
                self.add(found)

    def add(self, new: dict[str, Any]) -> None:
        """Write what `out` holds and a `new` run; another process may have added one since."""
        known = {**records(self.out), key(new): new}
        place = {of: i for i, of in enumerate(self.order)}
        kept = sorted(
            (r for r in known.values() if (r["task"], r["name"]) in place),
            key=lambda r: (place[r["task"], r["name"]], r["seed"]),
        )
        self.put("runs", kept)

    def put(self, part: str, value: Any) -> None:
        """Write what `out` holds, and this part of it."""
        there = json.loads(self.out.read_text()) if self.out.is_file() else {}
        others = {name: there[name] for name in there if name not in self.head}
        write({**self.head, **others, part: value}, self.out)


def command_line(description: str, weights: str) -> argparse.ArgumentParser:
    """What any benchmark of such runs is asked for. `weights`: the files of their folder."""
    parser = argparse.ArgumentParser(
        description=f"{description}; goes on where it was interrupted."
    )
    parser.add_argument("--weights", type=Path, help=f"folder of {weights}")
    parser.add_argument(
        "--only", nargs="+", default=(), help='runs whose name holds all of these, as "seed 0"'
    )
    parser.add_argument("--table", action="store_true", help="print what is there, do nothing")
    parser.add_argument("--quick", action="store_true", help="a few steps of tiny models")
    parser.add_argument("--out", type=Path)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line(
        "Learned optimizers beside tuned AdamW and Muon; hours on one CPU core",
        "celo2.safetensors, celo.safetensors",
    )
    args = parser.parse_args(argv)
    out = args.out or (RESULTS / "quick" if args.quick else RESULTS) / "quality.json"
    tasks, seeds = (QUICK, SEEDS[:1]) if args.quick else (TASKS, SEEDS)
    if not args.table:
        head = {
            "what": "held-out loss, nats per byte or image, of learned optimizers at their "
            "defaults beside tuned AdamW and Muon, by step and CPU second",
            **environment(),
            "quick": args.quick,
            "tasks": {str(task): task.what for task in tasks},
            "contenders": list(CONTENDERS),
            "seeds": list(seeds),
        }
        ledger = Ledger(out, head, list(product(map(str, tasks), CONTENDERS)))

        def is_wanted(run: Run, own: Sequence[dict[str, Any]]) -> bool:
            return (run.name, run.seed) in wanted(own, list(CONTENDERS), seeds)

        todo = chosen(runs(tasks, seeds, args.weights), args.only)
        ledger.go_on(todo, args.weights, is_wanted)
    if not out.is_file():
        parser.error(f"nothing was run, and there is no {out}")
    print(report(json.loads(out.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())

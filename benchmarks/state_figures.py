"""Figures of state in bfloat16 that need no training run: how far its updates are from those of
float32 state, the error of a mean that is rounded in every step, the peak of a rank, the time of a
step. bench_state.py writes them.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_memory import HALVED, SMALL, Case, compare, formula_of, shapes_of
from bench_step import Contender, random_weights
from model import build
from presets import EMBEDDINGS, PRESETS, GPTConfig
from record import markdown
from torch import Tensor

import pylo_dist
from pylo_dist.maths.rounding import Rounding

BFLOAT16 = {"state_dtype": "bfloat16"}

# ----------------------------------------------------------------------------------------- updates

# faces with the weights they take: a name, a file of the folder that is given, or None, random
# numbers, also where there is no such file
RULES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "AdafacLO": ("demo", {}),
    "MuLO": (None, {"width_mults": {}}),
    "ELO": (None, {}),
    "VeLO": (None, {"num_steps": 1000}),
    "Celo": ("celo.safetensors", {"num_steps": 1000}),
    "CeloAdam": ("celo_adam.safetensors", {"num_steps": 1000}),
    "CELO2": ("celo2.safetensors", {"embedding_pattern": EMBEDDINGS}),
    "ELO_CELO2": ("celo2.safetensors", {}),
}
ARCHITECTURES = {
    "MuLO": "small_fc",
    "ELO": "elo",
    "VeLO": "velo",
    "Celo": "celo",
    "CeloAdam": "celo_adam",
    "CELO2": "celo2",
    "ELO_CELO2": "celo2",
}


def weights_of(rule: str, folder: Path | None) -> tuple[Any, str]:
    """What `weights=` of a face gets, and a word for it."""
    wanted = RULES[rule][0]
    if wanted == "demo":
        return wanted, wanted
    if wanted is not None and folder is not None and (folder / wanted).is_file():
        return folder / wanted, "real"
    return pylo_dist.random_weights(ARCHITECTURES[rule]), "random"


def updates(
    config: GPTConfig, batches: Sequence[np.ndarray], folder: Path | None
) -> dict[str, Any]:
    """By rule the relative L2 distance of the updates of all tensors and steps, sqrt(sum of
    (h - f)^2 / sum of f^2), of an optimizer with halved state (h) that gets the gradients of the
    run of one with float32 state (f).

    Args:
        batches: of every step its windows, int64 (n, tokens + 1).
        folder: of the files of weights, or None.
    """
    torch.set_num_threads(1)
    rows = {}
    for rule, (_, arguments) in RULES.items():
        weights, kind = weights_of(rule, folder)
        arguments = {**arguments, "weights": weights}
        models = [build(config, 0) for _ in range(2)]
        optimizers = [
            getattr(pylo_dist, rule)(model.named_parameters(), **arguments, **how)
            for model, how in zip(models, ({}, BFLOAT16), strict=True)
        ]
        full, halved = (list(model.parameters()) for model in models)
        apart = size = 0.0
        for tokens in map(torch.from_numpy, batches):
            loss = models[0](tokens[:, :-1], tokens[:, 1:])[1]
            loss.backward()
            for one, other in zip(full, halved, strict=True):
                other.grad = None if one.grad is None else one.grad.clone()
            moved = []
            for params, optimizer in zip((full, halved), optimizers, strict=True):
                before = [p.detach().double() for p in params]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", pylo_dist.RandomWeightsWarning)
                    optimizer.step(loss.detach())
                optimizer.zero_grad()
                moved.append([p.detach().double() - q for p, q in zip(params, before, strict=True)])
            apart += sum(float((a - b).square().sum()) for a, b in zip(*moved, strict=True))
            size += sum(float(a.square().sum()) for a in moved[0])
        rows[rule] = {"weights": kind, "relative_l2": float(f"{math.sqrt(apart / size):.3g}")}
    return {"steps": len(batches), "rules": rows}


def updates_table(found: Mapping[str, Any]) -> str:
    lines = [["optimizer", "weights", f"relative L2 of {found['steps']} updates"]]
    lines += [
        [rule, row["weights"], f"{row['relative_l2']:.1e}"] for rule, row in found["rules"].items()
    ]
    return markdown(lines)


# ------------------------------------------------------------------------------------------- means

INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "n": lambda n: n,
    "1 + n": lambda n: 1 + n,
    "n^2": lambda n: n * n,
}
DECAYS = (0.9, 0.99, 0.999)


def means(
    decays: Sequence[float] = DECAYS, elements: int = 2048, lives: float = 6.0
) -> dict[str, Any]:
    """How far means that are stored in bfloat16 stand from the exact ones, in the long run.

    m <- round(b m + (1 - b) x), of inputs x made of normal numbers n. Rounding by chance adds an
    error that is 0 on average and has the variance u^2 f (1 - f), where u is the unit in the last
    place and f what is cut off, in units. Errors of two steps know nothing of each other, so that
    of the mean tends to

        variance = E[u^2 f (1 - f)] / (1 - b^2), at most E[u^2] / 4 / (1 - b^2),
        E[u^2] / 6 / (1 - b^2) where all f are as likely.

    Args:
        lives: how many times 1 / (1 - b) steps are taken; what counts are those after two thirds.

    Returns:
        "rows", by decay and input, all but the decay over the rms of the exact mean: "error" and
        "mean_error" of rounding by chance, root mean square and mean over elements and steps;
        "formula" and "formula_even", the roots of the first and the last variance above;
        "nearest" and "nearest_mean_error", of rounding to nearest.
    """
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(len(INPUTS) * elements).view(len(INPUTS), elements)
    rows = []
    for decay in decays:
        shape = index.shape
        exact = torch.zeros(shape, dtype=torch.float64)
        chance, nearest = (torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2))
        sums = torch.zeros(7, len(INPUTS), dtype=torch.float64)
        steps = round(lives / (1 - decay))
        for step in range(steps):
            n = torch.randn(elements, generator=generator)
            x = torch.stack([of(n) for of in INPUTS.values()])
            exact = decay * exact + (1 - decay) * x.double()
            fresh = chance.float() * decay + x * (1 - decay)
            hyper = {"state_seed": 0, "step": torch.tensor(step)}
            draw = Rounding.of(hyper, torch.device("cpu")).of_elements(index, index.numel())
            chance = draw.rounded(fresh, 0)
            nearest = (nearest.float() * decay + x * (1 - decay)).to(torch.bfloat16)
            if step < 2 * steps // 3:
                continue
            unit = torch.exp2(torch.frexp(fresh.double().abs())[1].double() - 8)
            cut = (fresh.double() / unit).frac().abs()
            figures = (
                exact.square(),
                *((chance.double() - exact).square(), chance.double() - exact),
                *(unit.square() * cut * (1 - cut), unit.square() / 6),
                *((nearest.double() - exact).square(), nearest.double() - exact),
            )
            sums += torch.stack([figure.mean(1) for figure in figures])
        sums /= steps - 2 * steps // 3
        sums[3:5] /= 1 - decay**2
        for i, name in enumerate(INPUTS):
            square, error, bias, formula, even, wrong, off = sums[:, i].tolist()
            rms = math.sqrt(square)
            row = {
                "error": math.sqrt(error) / rms,
                "mean_error": bias / rms,
                "formula": math.sqrt(formula) / rms,
                "formula_even": math.sqrt(even) / rms,
                "nearest": math.sqrt(wrong) / rms,
                "nearest_mean_error": off / rms,
            }
            rows.append({"decay": decay, "input": name, **{k: round(v, 6) for k, v in row.items()}})
    return {"elements": elements, "lives": lives, "rows": rows}


def means_table(found: Mapping[str, Any]) -> str:
    lines: list[Sequence[str]] = [
        (
            *("decay", "input", "error, rms", "formula", "formula, even f", "mean error"),
            *("to nearest: error, rms", "mean error"),
        )
    ]
    for row in found["rows"]:
        keys = ("error", "formula", "formula_even", "mean_error", "nearest", "nearest_mean_error")
        shown = [f"{row[k]:+.2%}" if "mean" in k else f"{row[k]:.2%}" for k in keys]
        lines.append([f"{row['decay']:g}", row["input"], *shown])
    return markdown(lines)


# -------------------------------------------------------------------------------------------- peak

PEAK_CASES: list[Case] = [(name, 2) for name in ("AdafacLO", HALVED, "AdamW")]


def peak(ranks: Sequence[int] = (2, 4)) -> dict[str, Any]:
    """The peak of a rank of ZeRO-2: measured on a small model beside the formula, and computed of
    GPT-2 355M on 8 ranks.
    """
    rows = [row for n in ranks for row in compare("6.4M", SMALL, n, PEAK_CASES, 0.5, 2)]
    return {"rows": rows, **over_adamw(rows)}


def over_adamw(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Peaks over those of fused AdamW: as measured, by number of ranks; and of GPT-2 355M on 8
    ranks by the formula, and with what a rank was measured to hold beyond it. That is tables and
    sums of the compiled passes, so many bytes for every entry of a row or column factor (of the
    measurements the least: a bucket that left late is in the others).
    """
    measured: dict[str, dict[str, float]] = {}
    beyond: dict[str, float] = {}
    for row in rows:
        name, found = row["optimizer"], row["measured"]["peak"]
        adamw = next(
            other["measured"]["peak"]
            for other in rows
            if (other["ranks"], other["optimizer"]) == (row["ranks"], "AdamW")
        )
        if name != "AdamW":
            measured.setdefault(str(row["ranks"]), {})[name] = round(found / adamw, 4)
            over = (found - row["computed"]["peak"]) / factor_entries(SMALL)
            beyond[name] = min(over, beyond.get(name, math.inf))
    large = {
        name: formula_of(PRESETS["355m"], name, ranks=8, stage=2).peak for name, _ in PEAK_CASES
    }
    entries = factor_entries(PRESETS["355m"])
    return {
        "measured_over_adamw": measured,
        "bytes_beyond_per_factor_entry": {name: round(x, 1) for name, x in beyond.items()},
        "355m_8_ranks_over_adamw": {
            name: {
                "computed": round(large[name] / large["AdamW"], 4),
                "with_what_is_beyond": round((large[name] + x * entries) / large["AdamW"], 4),
            }
            for name, x in beyond.items()
        },
    }


def factor_entries(config: GPTConfig) -> int:
    """Rows and columns of all factored tensors."""
    shapes = [shape for shape in shapes_of(config).values() if len(shape) > 1]
    return sum(math.prod(shape) // size for shape in shapes for size in sorted(shape)[-2:])


def peak_table(found: Mapping[str, Any]) -> str:
    lines: list[Sequence[str]] = [
        (
            *("ranks", "optimizer", "state, MB", "peak measured, MB", "computed", "ratio"),
            "measured / AdamW's",
        )
    ]
    for row in found["rows"]:
        over = found["measured_over_adamw"][str(row["ranks"])].get(row["optimizer"], 1.0)
        lines.append(
            (
                str(row["ranks"]),
                row["optimizer"],
                f"{row['measured']['state'] / 1e6:.1f}",
                f"{row['measured']['peak'] / 1e6:.1f}",
                f"{row['computed']['peak'] / 1e6:.1f}",
                f"{row['peak_measured_over_computed']:.3f}",
                f"{over:.3f}",
            )
        )
    told = [
        f"{name} {ratio['computed']:.4f} by the formula, {ratio['with_what_is_beyond']:.4f} with "
        f"the {found['bytes_beyond_per_factor_entry'][name]:.0f} bytes per entry of a factor that "
        "were measured beyond it"
        for name, ratio in found["355m_8_ranks_over_adamw"].items()
    ]
    return f"{markdown(lines)}\n\nComputed, 355m on 8 ranks, over AdamW's: {'; '.join(told)}."


# -------------------------------------------------------------------------------------------- step

VELO_PASSES = ("gradient_pass", "feature_pass", "update_pass")
IN_CACHE, OUT_OF_CACHE = [(512, 512)], [(2048, 2048)] * 16  # 256 Ki and 64 Mi elements


def step(quick: bool, rounds: int = 7) -> dict[str, Any]:
    """Times of a step of VeLO, ns per parameter, with float32 and with bfloat16 state in turns, of
    one thread and of two: medians of the rounds, of which there are more in cache, and of the
    passes together the least too, which is what a busy machine leaves in its caches.

    Args:
        quick: one round, in cache alone.
    """
    sizes = (
        {"in cache": IN_CACHE} if quick else {"in cache": IN_CACHE, "out of cache": OUT_OF_CACHE}
    )
    weights = random_weights("velo")
    rows = []
    for size, shapes in sizes.items():
        entries = {
            dtype: Contender(
                dtype,
                shapes,
                "cpu",
                lambda p, dtype=dtype: pylo_dist.VeLO(
                    p, num_steps=100_000, weights=weights, state_dtype=dtype
                ),
            )
            for dtype in ("float32", "bfloat16")
        }
        numel = sum(math.prod(shape) for shape in shapes)
        turns = 1 if quick else rounds if numel > 1 << 22 else 20 * rounds
        for count in (1, 2):
            torch.set_num_threads(count)
            for entry in entries.values():
                entry.step()
                entry.seconds.clear()
            for _ in range(turns):
                for entry in entries.values():
                    entry.measure()
            for dtype, entry in entries.items():
                found, seconds = entry.row(), entry.seconds
                least = sum(map(min, (seconds[name] for name in VELO_PASSES)))
                rows.append(
                    {
                        "size": size,
                        "elements": numel,
                        "threads": count,
                        "state": dtype,
                        "cpu": found["step"],
                        "wall": found["wall"],
                        "passes": round(sum(found[name] for name in VELO_PASSES), 3),
                        "least": round(1e9 * least / numel, 3),
                        **{name: found[name] for name in VELO_PASSES},
                    }
                )
        torch.set_num_threads(1)
        del entries
        gc.collect()
    return {"rounds": rounds, "rows": rows}


def step_table(found: Mapping[str, Any]) -> str:
    names = ("cpu", "wall", "passes", "least", *VELO_PASSES)
    lines: list[Sequence[str]] = [
        ("ns per parameter", "threads", "state", *(n.replace("_", " ") for n in names))
    ]
    pairs: dict[tuple[str, int], dict[str, Any]] = {}
    for row in found["rows"]:
        lines.append(
            (
                *(row["size"], str(row["threads"]), row["state"]),
                *(f"{row[name]:.2f}" for name in names),
            )
        )
        pairs.setdefault((row["size"], row["threads"]), {})[row["state"]] = row
    for (size, count), pair in pairs.items():
        ratios = (f"{pair['bfloat16'][n] / max(pair['float32'][n], 1e-9):.2f}" for n in names)
        lines.append((size, str(count), "bfloat16 / float32", *ratios))
    return markdown(lines)

"""The golden files, numbers of the public JAX reference (google/learned_optimization), and what
must reproduce them.

Shapes: (7,5) (5,7) (6,6) (13,) () (1,9) (3,4,5) (4,3,3,2) (2,2,6,7); 12 steps; gradients from 1e-4
to 1e2, a row without gradient, one step without any, two entries beyond 1000. `*_f64` was made
under x64, where the reference keeps its time features in float32; `*_f32` as shipped.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import pylo_dist

GOLDEN = Path(__file__).parents[1] / "golden"
# Golden files that hold released weights, or need them, are not in the repository; what needs one
# runs where it is found: in this folder, or in that of the environment variable.
ELSEWHERE = Path(
    os.environ.get("PYLO_DIST_GOLDEN") or Path(__file__).parents[3] / "shared" / "golden"
)
STEPS = 12
Arrays = dict[str, np.ndarray]


def path_of(name: str) -> Path:
    """The golden file of that name; it may be missing, see ELSEWHERE."""
    path = GOLDEN / f"{name}.npz"
    return path if path.exists() else ELSEWHERE / path.name


def load(name: str) -> Arrays:
    """Its arrays; skips the test where it is not there."""
    path = path_of(name)
    if path.parent == ELSEWHERE and not path.exists():
        pytest.skip(f"{path.name} is not in {ELSEWHERE} (PYLO_DIST_GOLDEN names another folder)")
    with np.load(path) as file:
        return dict(file)


def tensor(array: np.ndarray) -> Tensor:
    return torch.tensor(np.ascontiguousarray(array))


def small_fc_weights(file: Arrays) -> dict[str, Tensor]:
    """The meta-network of a small_fc file, (in, out) there, under PyLO's names, (out, in)."""
    weights = {}
    for i, layer in enumerate(("network.input", "network.linear_0", "network.output")):
        weights[f"{layer}.weight"] = tensor(file[f"w{i}"].T)
        weights[f"{layer}.bias"] = tensor(file[f"b{i}"])
    return weights


def velo_meta(size: str) -> Arrays:
    """VeLO's meta-parameters ("small" or "release") by the reference's names; stored as int8 times
    a power of two.
    """
    file = load(f"velo_{size}_meta_int8")
    names = [key.removeprefix("q:") for key in file if key.startswith("q:")]
    return {
        name: file[f"q:{name}"].astype(np.float32) * np.float32(file[f"scale:{name}"])
        for name in names
    }


def velo_weights(size: str) -> dict[str, Tensor]:
    """The same under PyLO's names."""
    return lstm_weights(velo_meta(size).__getitem__)


def celo_weights(file: Arrays) -> dict[str, Tensor]:
    """Celo's or Celo-Adam's meta-parameters, which are in their golden files, under our names."""
    return lstm_weights(lambda name: file[f"theta:{name}"], "theta:ff_mod_stack/~/b0" in file)


def lstm_weights(get: Callable[[str], np.ndarray], mlp: bool = True) -> dict[str, Tensor]:
    """What the JAX reference calls its meta-parameters under PyLO's names; `mlp`: with the sets of
    an MLP and what mixes them.
    """
    weights = {}
    layers = {
        "mix_layer1": "linear",
        "mix_layer2": "linear_1",
        "final_mix_layer": "linear_2",
        "lstm.linear": "rnn/linear",
        **({"rnn_to_controls": "rnn_to_controls"} if mlp else {}),
        "step_size": "step_size",
    }
    for ours, theirs in layers.items():
        weights[f"{ours}.weight"] = tensor(get(f"rnn_params/{theirs}/w").T)
        weights[f"{ours}.bias"] = tensor(get(f"rnn_params/{theirs}/b"))
    for i, theirs in enumerate(("hidden", "cell")):
        weights[f"lstm_init_state.{i}"] = tensor(get(f"lstm_init_state/{theirs}"))
    if not mlp:
        return weights
    stack = "ff_mod_stack/~/"
    # one matrix per group of features
    first = np.concatenate([get(f"{stack}w0__{i}") for i in range(14)], axis=1)
    for name, weight, bias in (
        ("input_{}_", first, "b0"),
        ("hidden_{}_.0", get(f"{stack}w1"), "b1"),
        ("output_{}_", get(f"{stack}w2"), "b2"),
    ):
        weights[name.format("weights")] = tensor(weight.transpose(0, 2, 1))
        weights[name.format("bias")] = tensor(get(stack + bias))
    return weights


Build = Callable[[list[tuple[str, Tensor]], Arrays], pylo_dist.LearnedOptimizer]


def adafac(params: list[tuple[str, Tensor]], file: Arrays) -> pylo_dist.LearnedOptimizer:
    # the golden run used PyLO's decay offsets, which are what a mapping without stored decays
    # implies
    return pylo_dist.AdafacLO(params, weights=small_fc_weights(file))


def mulo(params: list[tuple[str, Tensor]], file: Arrays) -> pylo_dist.LearnedOptimizer:
    mults = {
        fqn: 1.0 / float(scale) for (fqn, _), scale in zip(params, file["step_scale"], strict=True)
    }
    return pylo_dist.MuLO(params, weights=small_fc_weights(file), width_mults=mults)


def elo(params: list[tuple[str, Tensor]], file: Arrays) -> pylo_dist.LearnedOptimizer:
    clip = float(file["clip_norm"])
    return pylo_dist.ELO(
        params,
        weights=small_fc_weights(file),
        lr=float(file["lr"]),
        weight_decay=float(file["weight_decay"]),
        clip_grad=clip > 0,
        clip_norm=clip or 1.0,
    )


def velo(params: list[tuple[str, Tensor]], file: Arrays) -> pylo_dist.LearnedOptimizer:
    size = "small" if file["lstm_h0"].shape[1] == 32 else "release"
    return pylo_dist.VeLO(
        params, num_steps=int(file["num_steps"]), weights=velo_weights(size), tie_break="as_given"
    )


def celo(params: list[tuple[str, Tensor]], file: Arrays) -> pylo_dist.LearnedOptimizer:
    num_steps = int(file["num_steps"])
    return pylo_dist.Celo(
        params, num_steps=num_steps, weights=celo_weights(file), tie_break="as_given"
    )


def celo_adam(params: list[tuple[str, Tensor]], file: Arrays) -> pylo_dist.LearnedOptimizer:
    num_steps = int(file["num_steps"])
    return pylo_dist.CeloAdam(params, num_steps=num_steps, weights=celo_weights(file))


def celo2_weights(file: Arrays) -> dict[str, Tensor]:
    """CELO2's MLP, (in, out) there as in PyLO's files; the first matrix split into its 14 groups of
    features.
    """
    weights, first = {}, 0
    for i, width in enumerate((1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)):
        weights[f"w0.{i}"] = tensor(file["w0"][first : first + width])
        first += width
    return {
        **weights,
        "b0": tensor(file["b0"]),
        "dense_w.0": tensor(file["w1"]),
        "dense_b.0": tensor(file["b1"]),
        "dense_w.1": tensor(file["w2"]),
        "dense_b.1": tensor(file["b2"]),
    }


def celo2(params: list[tuple[str, Tensor]], file: Arrays) -> pylo_dist.LearnedOptimizer:
    """CELO2 and ELO-CELO2; the file carries the constructor's arguments."""
    shared = "t3.mom" in file  # AdamW on the learned accumulators
    names = [
        "lr",
        "weight_decay",
        "adam_lr_mult",
        "adam_weight_decay",
        "clip_norm",
        "exp_mult",
        "rmsmult",
        "grad_clip_val",
    ]
    kwargs: dict[str, object] = {name: float(file[f"cfg.{name}"]) for name in names}
    kwargs |= {
        name: bool(file[f"cfg.{name}"])
        for name in ("orthogonalize", "clip_grad", "param_scale_mult")
    }
    if not shared:
        kwargs |= {
            "adam_betas": tuple(file["cfg.adam_betas"]),
            "adam_eps": float(file["cfg.adam_eps"]),
        }
    if int(file["embedding_tensor"]) >= 0:
        kwargs["embedding_pattern"] = f"^t{int(file['embedding_tensor'])}$"
    cls = pylo_dist.ELO_CELO2 if shared else pylo_dist.CELO2
    return cls(params, weights=celo2_weights(file), **kwargs)


@dataclass(frozen=True)
class Case:
    """A golden file without its precision suffix, and what reproduces it."""

    name: str
    build: Build


CASES = {
    case.name: case
    for case in (
        Case("small_fc", adafac),
        Case("mulo", mulo),
        Case("elo", elo),
        Case("elo_wd_clip", elo),
        Case("velo_small", velo),
        Case("velo_release", velo),
        Case("celo_small", celo),
        Case("celo", celo),
        Case("celo_adam", celo_adam),
        Case("celo2_default", celo2),
        Case("celo2_wd_clip", celo2),
        Case("celo2_base", celo2),
        Case("elo_celo2_default", celo2),
        Case("elo_celo2_mult20", celo2),
    )
}


@dataclass
class Step:
    """One step of a run on golden gradients: `before` and `params` by tensor, `states` as the
    optimizer holds them.
    """

    t: int
    before: list[Tensor]
    params: list[Tensor]
    states: list[dict[str, Tensor]]
    optimizer: pylo_dist.LearnedOptimizer


def run(case: Case, file: Arrays, dtype: torch.dtype) -> Iterator[Step]:
    count = sum(key.endswith(".p0") for key in file)
    params = [torch.nn.Parameter(torch.tensor(file[f"t{i}.p0"]).to(dtype)) for i in range(count)]
    optimizer = case.build([(f"t{i}", p) for i, p in enumerate(params)], file)
    for t in range(file["t0.g"].shape[0]):
        before = [p.detach().clone() for p in params]
        for i, param in enumerate(params):
            param.grad = torch.tensor(file[f"t{i}.g"][t]).to(dtype)
        optimizer.step(loss=torch.tensor(file["losses"][t]) if "losses" in file else None)
        yield Step(
            t, before, [p.detach() for p in params], [optimizer.state[p] for p in params], optimizer
        )


def state(file: Arrays, i: int, t: int, suffix: str = "") -> dict[str, Tensor]:
    """The state of tensor i after step t with our names and axes, decays first. `suffix` "_last":
    of files with one state.
    """

    def get(key: str) -> Tensor:
        array = file[f"t{i}.{key}{suffix}"]
        return torch.tensor(array if suffix else array[t])

    if "adam_eps" in file:  # Celo-Adam
        return {"exp_avg": get("mom").squeeze(-1), "exp_avg_sq": get("rms").squeeze(-1)}
    if f"t{i}.exp_avg" in file:
        return {"exp_avg": get("exp_avg"), "exp_avg_sq": get("exp_avg_sq")}
    # ELO-CELO2's AdamW: the first momentum and the mean square
    if "cfg.lr" in file and len(file[f"t{i}.shape"]) < 2:
        return {"exp_avg": get("mom")[..., 0], "exp_avg_sq": get("rms")[..., 0]}
    factors = {"row": "vrow", "col": "vcol"} if len(file[f"t{i}.shape"]) >= 2 else {"diag": "vdiag"}
    names = {"momentum": "mom", **factors}
    found = {
        **{ours: get(theirs).movedim(-1, 0) for ours, theirs in names.items()},
        "rms": get("rms").squeeze(-1),
    }
    if "lstm_h" in file and "theta:rnn_params/linear/w" not in file:  # Celo's is the run's
        found |= {
            "lstm_hidden": torch.tensor(file["lstm_h"][t][i]),
            "lstm_cell": torch.tensor(file["lstm_c"][t][i]),
        }
    return found


def updates(file: Arrays, i: int) -> Tensor:
    """(T, *shape) float64 updates of tensor i."""
    p = torch.tensor(file[f"t{i}.p"]).double()
    return p - torch.cat([torch.tensor(file[f"t{i}.p0"]).double()[None], p[:-1]])


def relative(got: Tensor, wanted: Tensor) -> float:
    """Relative L2 difference; the absolute one where the wanted norm is 0; inf for what is no
    number.
    """
    norm = float(wanted.double().norm())
    difference = float((got.double() - wanted.double()).norm())
    if not math.isfinite(difference):
        return math.inf
    return difference / norm if norm else difference

"""Write a small checkpoint of every learned optimizer, for later versions to load to the bit.

    python tests/checkpoint/saved/write.py FOLDER        e.g. tests/checkpoint/saved/acc4d19, of
                                                         that commit

Run with the version that is to be remembered: it uses nothing but the public contract, and no
    random numbers.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

import pylo_dist
from pylo_dist import checkpoint

SHAPES: dict[str, tuple[int, ...]] = {
    "embedding": (6, 4),
    "square": (4, 4),
    "conv": (2, 3, 2, 2),
    "bias": (5,),
    "scalar": (),
}
SIZES = {"H": 6, "2H": 12, "4H": 24, "P": 3}
STEPS = 3


def numbers(shape: tuple[int, ...], salt: int, unit: float = 1e-3) -> Tensor:
    """Numbers between -100 and 100 units that look random, float32 of this shape."""
    places = torch.arange(math.prod(shape), dtype=torch.int64)
    return (
        (((places * 7919 + salt * 104729) % 201 - 100).to(torch.float64) * unit)
        .to(torch.float32)
        .view(shape)
    )


def small_fc() -> dict[str, Tensor]:
    shapes = {"input": (32, 39), "linear_0": (32, 32), "output": (2, 32)}
    weights = {}
    for salt, (layer, (out, into)) in enumerate(shapes.items()):
        weights[f"network.{layer}.weight"] = numbers((out, into), salt)
        weights[f"network.{layer}.bias"] = numbers((out,), 10 + salt)
    return weights


def velo() -> dict[str, Tensor]:
    shapes: dict[str, tuple[Any, ...]] = {
        "lstm.linear": ("4H", "2H"),
        "rnn_to_controls": ("P", "H"),
        "step_size": (1, "H"),
        **{
            f"{name}mix_layer{number}": ("H", 30)
            for name, number in (("", 1), ("", 2), ("final_", ""))
        },
    }
    weights = {}
    for salt, (layer, shape) in enumerate(shapes.items()):
        out, into = (SIZES.get(size, size) for size in shape)
        weights[f"{layer}.weight"] = numbers((out, into), 20 + salt)
        weights[f"{layer}.bias"] = numbers((out,), 30 + salt)
    for i in (0, 1):
        weights[f"lstm_init_state.{i}"] = numbers((1, SIZES["H"]), 40 + i)
    stacks = {"input": (4, 30), "hidden": (4, 4), "output": (3, 4)}
    for salt, (layer, (out, into)) in enumerate(stacks.items()):
        of = ".0" if layer == "hidden" else ""
        weights[f"{layer}_weights_{of}"] = numbers((SIZES["P"], out, into), 50 + salt)
        weights[f"{layer}_bias_{of}"] = numbers((SIZES["P"], out), 60 + salt)
    return weights


def celo2() -> dict[str, Tensor]:
    widths = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
    weights = {f"w0.{i}": numbers((width, 8), 70 + i) for i, width in enumerate(widths)}
    weights |= {
        "b0": numbers((8,), 90),
        "dense_w.0": numbers((8, 8), 91),
        "dense_b.0": numbers((8,), 92),
    }
    return {**weights, "dense_w.1": numbers((8, 3), 93), "dense_b.1": numbers((3,), 94)}


OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adafac": ("AdafacLO", {"weights": small_fc()}),
    "mulo": ("MuLO", {"weights": small_fc(), "width_mults": {"square": 2.0}}),
    "velo": ("VeLO", {"weights": velo(), "num_steps": 10}),
    "elo": ("ELO", {"weights": small_fc()}),
    "celo2": ("CELO2", {"weights": celo2(), "embedding_pattern": "embedding"}),
    "elo_celo2": ("ELO_CELO2", {"weights": celo2()}),
}


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for salt, (name, shape) in enumerate(SHAPES.items()):
            self.register_parameter(name, nn.Parameter(numbers(shape, 100 + salt).to(dtype)))


def build(name: str, zero: bool = False) -> tuple[Model, Any]:
    """A model, and its optimizer: plain, or under `zero` a ZeroOptimizer of bfloat16 parameters."""
    class_name, arguments = OPTIMIZERS[name]
    kind = getattr(pylo_dist, class_name)
    model = Model(torch.bfloat16 if zero else torch.float32)
    if zero:
        return model, pylo_dist.ZeroOptimizer(model, kind, stage=2, **arguments)
    return model, kind(model.named_parameters(), **arguments)


def step(model: Model, optimizer: Any, number: int) -> None:
    for salt, param in enumerate(model.parameters()):
        param.grad = numbers(tuple(param.shape), 1000 * number + salt, 2.0**-10).to(param.dtype)
    optimizer.step(loss=torch.tensor(3.0 / (1 + number)))
    optimizer.zero_grad()


def flat(model: Model, state: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors and numbers of a model and of a whole state dict, under one key each."""
    found = {f"param.{name}": p.detach().clone() for name, p in model.named_parameters()}
    for i, entries in state["state"].items():
        found |= {
            f"state.{i}.{name}": torch.as_tensor(value).clone() for name, value in entries.items()
        }
    for i, group in enumerate(state["param_groups"]):
        for key, value in group.items():
            if isinstance(value, Tensor):
                found[f"group.{i}.{key}"] = value.clone()
    return found


def main(folder: Path) -> None:
    for name in OPTIMIZERS:
        model, optimizer = build(name)
        for number in range(STEPS):
            step(model, optimizer, number)
        (folder / name).mkdir(parents=True)
        meta = {"steps": STEPS, "version": pylo_dist.__version__}
        checkpoint.save(
            folder / name / "checkpoint", {"model": model, "optimizer": optimizer}, meta=meta
        )
        state = optimizer.state_dict()
        torch.save(state, folder / name / "state.pt")
        save_file(flat(model, state), folder / name / "expected.safetensors")
    torch.multiprocessing.spawn(sharded, (2, folder / "adafac_zero2_bfloat16"), nprocs=2)


def sharded(rank: int, ranks: int, folder: Path) -> None:
    store = dist.FileStore(f"{folder}.store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    model, optimizer = build("adafac", zero=True)
    for number in range(STEPS):
        step(model, optimizer, number)
    if rank == 0:
        folder.mkdir()
    dist.barrier()
    checkpoint.save(folder / "checkpoint", {"model": model, "optimizer": optimizer})
    state = pylo_dist.full_state_dict(optimizer, rank0_only=True)
    if rank == 0:
        save_file(flat(model, state), folder / "expected.safetensors")
        Path(f"{folder}.store").unlink()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())

"""What the DeepSpeed tests share: a model whose gradients are given, its JSON, runs on ranks and on
one process.
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

import pylo_dist
from pylo_dist.core.pieces import bound_shard
from support.optimizers import OPTIMIZERS, Roles, cases

# Shapes that break sharded optimizers: uneven, [1, N], dims below the ranks, square, more than two
# dims, one element. (DeepSpeed itself cannot broadcast a 0-d one.)
SHAPES: dict[str, tuple[int, ...]] = {
    "embedding": (503, 4),
    "row": (1, 37),
    "tiny": (2, 3),
    "square": (24, 24),
    "wide": (12, 40),
    "conv": (4, 3, 3, 3),
    "bias": (41,),
    "single": (1,),
    "unused": (6, 5),  # never has a gradient
    "frozen": (3,),
}


class Leaf(nn.Module):
    """One parameter. Its gradient is the coefficient that it is called with."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, coefficient: Tensor) -> Tensor:
        return (self.weight * coefficient.to(self.weight.dtype)).sum()


class Model(nn.Module):
    """`model(coefficients, loss)` has the value `loss`, and its gradients are the coefficients."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            # multiples of 2^-7 below one are bfloat16 numbers, so that every precision starts from
            # the same values
            weight = torch.randint(-127, 128, shape, generator=generator) / 128.0
            self.add_module(name, Leaf(nn.Parameter(weight, requires_grad=name != "frozen")))
        self.head = Leaf(self.embedding.weight)  # tied
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, coefficients: dict[str, Tensor], loss: float) -> Tensor:
        children = dict(self.named_children())
        total = sum(
            children[name](coefficient).float() for name, coefficient in coefficients.items()
        )
        return loss + (total - total.detach())


def coefficients(step: int, micro: int, rank: int) -> dict[str, Tensor]:
    """Multiples of 3/1024: sums over ranks and micro-batches, and means over 2 or 3 ranks, are
    exact in any order.

    At most 10 of them: the tied tensor's sum over 2 ranks and 2 micro-batches, 80 * 3 / 1024, is
        exact in bfloat16 too.
    """
    found = {}
    for name, shape in SHAPES.items():
        if name in ("unused", "frozen"):
            continue
        generator = torch.Generator().manual_seed(
            1000 * step + 100 * micro + 10 * rank + sum(map(ord, name))
        )
        found[name] = torch.randint(-10, 11, shape, generator=generator) * (3.0 / 1024.0)
    found["head"] = found["embedding"].flip(0)
    return found


def loss_of(step: int, micro: int, rank: int) -> float:
    return 3.0 - 0.0625 * step + 0.125 * rank + 0.25 * micro


def mean_gradients(step: int, micros: int, world: int) -> dict[str, Tensor]:
    """By fqn: what DeepSpeed should average to."""
    total: dict[str, Tensor] = {}
    for rank in range(world):
        for micro in range(micros):
            for name, c in coefficients(step, micro, rank).items():
                name = "embedding" if name == "head" else name
                total[name] = total.get(name, torch.zeros(SHAPES[name])) + c
    return {f"{name}.weight": g / (world * micros) for name, g in total.items()}


def mean_loss(step: int, micros: int, world: int) -> float:
    losses = [loss_of(step, micro, rank) for micro in range(micros) for rank in range(world)]
    return sum(losses) / len(losses)


# DeepSpeed's JSON knows the optimizers of the package
ROLES = Roles(widths={"square.weight": 4.0, "embedding.weight": 2.0}, embedding="^embedding")
SERVED = cases(ROLES, (*OPTIMIZERS, "AdafacLO_halved"), built_in=True)
CLIPPING = ("clip_grad", "max_grad_norm", "clip")  # DeepSpeed's own, "gradient_clipping"


def write_weights(folder: Path) -> dict[str, str]:
    """Files of learned weights, by optimizer."""
    files = {name: str(folder / f"{name}.safetensors") for name in SERVED}
    for name, file in files.items():
        tensors = SERVED[name].arguments["weights"].items()
        save_file({key: tensor.float().contiguous() for key, tensor in tensors}, file)
    return files


def rules(files: dict[str, str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Type and params of the JSON entry of every optimizer."""
    return {
        name: (
            case.face.__name__,
            {
                **{key: v for key, v in case.arguments.items() if key not in CLIPPING},
                "weights": files[name],
            },
        )
        for name, case in SERVED.items()
    }


@dataclass(frozen=True)
class Case:
    """A run: ZeRO stage, rule, micro-batches per step, whether in two parameter groups, further
    JSON, whether under zero.Init.
    """

    stage: int
    rule: str = "AdafacLO"
    micros: int = 1
    groups: bool = False
    zero: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    zero_init: bool = False
    steps: int = 10

    def json(self, files: dict[str, str]) -> dict[str, Any]:
        name, params = rules(files)[self.rule]
        return {
            "optimizer": {"type": name, "params": dict(params)},
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.micros,
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": self.stage, **self.zero},
            **self.extra,
        }


def import_deepspeed() -> Any:
    """DeepSpeed without compilers: none of its operators is built at run time. Nor is that of torch
    loaded, for which its Muon asks (seconds of every rank).
    """
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["LOCAL_RANK"] = str(dist.get_rank())  # DeepSpeed asks for what launchers set
    logger.setLevel("ERROR")
    warnings.simplefilter("ignore")  # DeepSpeed calls what newer torch deprecates
    import pylo_dist.deepspeed  # noqa: F401

    return deepspeed


def build(case: Case, files: dict[str, str], **json: Any) -> Any:
    """A DeepSpeed engine; `json` takes the place of entries of the case's."""
    config = {**case.json(files), **json}
    model, params = model_of(case, config)
    return import_deepspeed().initialize(model=model, model_parameters=params, config=config)[0]


def model_of(case: Case, config: dict[str, Any]) -> tuple[Model, Any]:
    """The model of a case, and its parameters or groups."""
    zero = import_deepspeed().zero
    with zero.Init(config_dict_or_path=config) if case.zero_init else nullcontext():
        model = Model()
    return model, split_groups(model) if case.groups else model.parameters()


def split_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups with settings of their own; the frozen parameter is among the first."""
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if n[0] in "esbf"]},
        {"params": [p for n, p in named if n[0] not in "esbf"], "lr": 0.5, "weight_decay": 0.0},
    ]


def train(engine: Any, first: int, last: int, micros: int = 1) -> None:
    rank = dist.get_rank()
    for step in range(first, last):
        for micro in range(micros):
            engine.backward(engine(coefficients(step, micro, rank), loss_of(step, micro, rank)))
            engine.step()


def whole_params(engine: Any) -> dict[str, Tensor]:
    """The model's parameters, whole, on every rank."""
    import deepspeed

    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(
        list(named.values()), enabled=engine.zero_optimization_stage() == 3
    ):
        return {name: p.detach().clone() for name, p in named.items()}


def unsharded(
    case: Case,
    files: dict[str, str],
    world: int | Sequence[int],
    scales: Sequence[float] = (),
    rates: Sequence[float] = (),
) -> tuple[list[dict[str, Tensor]], pylo_dist.LearnedOptimizer]:
    """The same steps in one process on the mean gradients: parameters after each, and the
    optimizer.

    Args:
        world: number of ranks whose gradients are averaged, or that of every step.
        scales: what the gradients of a step are multiplied by; rates: the lr of a step.
    """
    _, params = rules(files)[case.rule]
    model = Model()
    named = dict(model.named_parameters())
    given: Any = [(n, p) for n, p in named.items() if p.requires_grad]
    if case.groups:
        fqns = {p: n for n, p in named.items()}
        given = [
            {**g, "params": [(fqns[p], p) for p in g["params"] if p.requires_grad]}
            for g in split_groups(model)
        ]
    face = SERVED[case.rule].face
    clips = "clip_grad" in inspect.signature(face).parameters
    optimizer = face(given, **params, **({"clip_grad": False} if clips else {}))
    history = [{n: p.detach().clone() for n, p in named.items()}]
    worlds = [world] * case.steps if isinstance(world, int) else world
    for step in range(case.steps):
        grads = mean_gradients(step, case.micros, worlds[step])
        for n, p in named.items():
            p.grad = grads.get(n)
            if scales and p.grad is not None:
                p.grad = p.grad * scales[step]
        for group in optimizer.param_groups:
            group["lr"] = rates[step] if rates else group["lr"]
        optimizer.set_loss(mean_loss(step, case.micros, worlds[step]))
        optimizer.step()
        history.append({n: p.detach().clone() for n, p in named.items()})
    return history, optimizer


def masters(engine: Any) -> dict[str, tuple[int, Tensor]]:
    """This rank's part of the float32 parameters: by fqn its start and its elements, flat."""
    found = {}
    for _, source, member in engine.basic_optimizer.layout.members():
        binding = bound_shard(member.piece)
        start = 0 if source.is_whole or binding is None else binding.shard.start
        found[member.fqn] = start, member.piece.detach().reshape(-1).clone()
    return found


def joined(parts: Sequence[dict[str, tuple[int, Tensor]]]) -> dict[str, Tensor]:
    """The whole tensors that the ranks' `masters` are parts of."""
    wholes = {}
    for fqn in parts[0]:
        name = fqn.removesuffix(".weight")
        whole = torch.full(SHAPES[name], math.nan)
        for start, piece in (part[fqn] for part in parts):
            whole.view(-1)[start : start + piece.numel()] = piece
        wholes[fqn] = whole
    return wholes

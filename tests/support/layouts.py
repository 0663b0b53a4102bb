"""The same training in every layout, for checkpoints: build it, step it, save it, load it, and say
what its state is.

Gradients are the same on every rank and integers over a power of two, so that their mean is exact
on any number of ranks and two runs differ by the arithmetic of their layouts alone.
"""

from __future__ import annotations

import datetime
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import pylo_dist
from pylo_dist.layouts.dtensor import shard_of, wrap_like
from pylo_dist.testing import largest_changes, layout_error
from support.optimizers import Roles, cases

RANKS = (1, 2, 3, 4, 8)
WORLD = max(RANKS)
STEPS, MORE = 3, 5  # before the checkpoint and after it
TIMEOUT = datetime.timedelta(seconds=600)  # ranks without a part wait for the others


class Model(nn.Module):
    """Shapes that break sharded state: uneven vocabulary, tied, [1, N], 0-d, smaller than the
    ranks, empty, frozen.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def tensor(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.02 * torch.randn(shape, generator=generator))

        self.embedding = tensor(53, 4)
        self.head = self.embedding  # tied
        self.row = tensor(1, 37)
        self.scalar = tensor()
        self.square = tensor(12, 12)
        self.wide = tensor(5, 16)
        self.conv = tensor(4, 3, 3, 3)
        self.bias = tensor(3)
        self.empty = tensor(0, 5)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(fqn, p) for fqn, p in self.named_parameters() if p.requires_grad]


ROLES = Roles(widths={"wide": 4.0, "square": 2.0}, embedding="embedding")
KINDS = cases(ROLES)
# one for each kind of state
LEARNED = tuple(name for name, case in KINDS.items() if not case.state_as)


@dataclass(frozen=True, order=True)
class Layout:
    """A way to hold the state, e.g. "zero1" on 3 ranks."""

    name: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.name}@{self.ranks}"


PLAIN = Layout("plain", 1)


def all_layouts() -> list[Layout]:
    sharded = ("ddp", "zero1", "zero2", "fsdp2")
    everywhere = [Layout(name, ranks) for name in sharded for ranks in RANKS]
    return [
        Layout("plain", 1),
        *everywhere,
        *(Layout("hsdp", ranks) for ranks in RANKS if ranks % 2 == 0),
    ]


def new_groups() -> dict[Any, Any]:
    """For each number of ranks a process group of the first of them, and the meshes of HSDP, in two
    copies, by layout.

    All ranks of the world call it.
    """
    world = dist.get_world_size()
    groups: dict[Any, Any] = {
        r: dist.new_group(list(range(r)), timeout=TIMEOUT) for r in RANKS if r <= world
    }
    for ranks in (r for r in groups.copy() if r % 2 == 0):
        mesh = torch.arange(ranks).view(2, ranks // 2)
        rows = [dist.new_group(row, timeout=TIMEOUT) for row in mesh.tolist()]
        columns = [dist.new_group(column, timeout=TIMEOUT) for column in mesh.T.tolist()]
        if dist.get_rank() < ranks:
            row, column = divmod(dist.get_rank(), ranks // 2)
            names = ("replicate", "shard")
            groups[Layout("hsdp", ranks)] = DeviceMesh.from_group(
                [columns[column], rows[row]], "cpu", mesh=mesh, mesh_dim_names=names
            )
    return groups


class Run:
    """A model and its optimizer in a layout.

    Args:
        group: of `layout.ranks` ranks, this one among them.
        mesh: of HSDP; FSDP2 has one of the group.
    """

    def __init__(
        self,
        layout: Layout,
        kind: str,
        group: Any,
        *,
        mesh: Any = None,
        seed: int = 0,
        **changes: Any,
    ) -> None:
        learned = kind in KINDS
        optimizer_class: Any = KINDS[kind].face if learned else torch.optim.AdamW
        kwargs = {**(KINDS[kind].arguments if learned else {"lr": 0.01}), **changes}
        self.model, self.taken, self.wrapped = Model(seed), 0, None
        if layout.name.startswith("zero"):
            stage = {"stage": int(layout.name[-1])}
            self.optimizer: Any = pylo_dist.ZeroOptimizer(
                self.model,
                optimizer_class,
                process_group=group,
                bucket_cap_mb=0.001,
                **stage,
                **kwargs,
            )
            return
        named = self.model.trainable()
        if layout.name == "ddp":
            self.wrapped = DistributedDataParallel(self.model, process_group=group)
            named = [(fqn, p) for fqn, p in self.wrapped.named_parameters() if p.requires_grad]
            kwargs |= {"process_group": group} if learned else {}
        elif layout.name in ("fsdp2", "hsdp"):
            mesh = mesh or DeviceMesh.from_group(group, "cpu")
            fully_shard(self.model, mesh=mesh, ignored_params={self.model.scalar, self.model.empty})
            named = self.model.trainable()
            kwargs |= {"process_group": group} if learned else {}
        elif learned:
            kwargs["process_group"] = False
        self.optimizer = optimizer_class(named, **kwargs)

    def advance(self, steps: int) -> list[dict[str, Tensor]]:
        """Take steps on the gradients of their numbers; the parameters before the first and after
        each.
        """
        history = [self.params()]
        for _ in range(steps):
            for place, (_, param) in enumerate(self.model.trainable()):
                generator = torch.Generator().manual_seed(1000 * self.taken + place)
                grad = torch.randint(-64, 65, param.shape, generator=generator) / 1024.0
                param.grad = (
                    wrap_like(param, shard_of("", param).take(grad), 0)
                    if isinstance(param, DTensor)
                    else grad
                )
            if hasattr(self.optimizer, "set_loss"):
                self.optimizer.set_loss(torch.tensor(3.0 - 0.0625 * self.taken))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.taken += 1
            history.append(self.params())
        return history

    def params(self) -> dict[str, Tensor]:
        """Whole; all ranks of the layout call it."""
        whole = {fqn: p.detach() for fqn, p in self.model.named_parameters()}
        return {
            fqn: (p.full_tensor() if isinstance(p, DTensor) else p).clone()
            for fqn, p in whole.items()
        }

    def state(self) -> dict[str, Any]:
        """Whole, on the first rank."""
        return flat_state(pylo_dist.full_state_dict(self.optimizer))

    def contents(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def save(self, folder: str, group: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(self.contents(), checkpoint_id=folder, process_group=group)

    def load(self, folder: str, group: Any) -> None:
        contents = self.contents()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(contents, checkpoint_id=folder, process_group=group)
        self.model.load_state_dict(contents["model"])
        self.optimizer.load_state_dict(contents["optimizer"])
        self.taken = STEPS


def flat_state(full: dict[str, Any]) -> dict[str, Any]:
    """The values of a whole state dict by path; names of parameters without DDP's prefix."""
    if not full:
        return {}
    flat = {
        f"{i}.{name}": value for i, state in full["state"].items() for name, value in state.items()
    }
    for i, group in enumerate(full["param_groups"]):
        flat |= {f"group {i}.{name}": value for name, value in group.items()}
        flat[f"group {i}.param_names"] = [
            name.removeprefix("module.") for name in group["param_names"]
        ]
    return flat


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Entries that are not the same to the bit."""
    return [
        key
        for key in sorted(a.keys() | b.keys())
        if key not in a or key not in b or not same_bits(a[key], b[key])
    ]


def same_bits(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and bool(a == b)
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    as_bytes = (
        [t.contiguous().view(-1).view(torch.uint8) for t in (a.cpu(), b.cpu())] if a.numel() else []
    )
    return not as_bytes or torch.equal(*as_bytes)


@dataclass
class Truth:
    """What a saved run was and how it went on."""

    state: dict[str, Any]
    params: dict[str, Tensor]
    history: list[dict[str, Tensor]]  # of the whole run


def save_all(layout: Layout, kind: str, groups: dict[int, Any], folder: str) -> Truth | None:
    """Train in `layout`, save, go on; on the first rank what a loaded run must equal. Ranks without
    a part return at once.
    """
    group = groups[layout.ranks]
    if dist.get_rank() >= layout.ranks:
        return None
    run = Run(layout, kind, group, mesh=groups.get(layout))
    history = run.advance(STEPS)
    run.save(path_of(folder, layout, kind), group)
    state, params = run.state(), run.params()
    history += run.advance(MORE)[1:]
    return Truth(state, params, history) if dist.get_rank() == 0 else None


def load_one(
    source: Layout,
    target: Layout,
    kind: str,
    groups: dict[int, Any],
    folder: str,
    truth: Truth | None,
) -> float:
    """Load `source`'s checkpoint in `target` and go on: how far its parameters end from the
    source's, 1 = the layout tolerance.

    Raises:
        AssertionError: state or parameters that are not those of the source to the bit.
    """
    group = groups[target.ranks]
    if dist.get_rank() >= target.ranks:
        return 0.0
    run = Run(target, kind, group, mesh=groups.get(target), seed=1)
    run.load(path_of(folder, source, kind), group)
    state, params = run.state(), run.params()
    end = run.advance(MORE)[-1]
    if truth is None:
        return 0.0
    assert not (wrong := differing(state, truth.state)), f"{kind} {source} -> {target}: {wrong}"
    assert not (wrong := differing(params, truth.params)), f"{kind} {source} -> {target}: {wrong}"
    share = KINDS[kind].share(torch.float32)
    errors = layout_error(end, truth.history[-1], largest_changes(truth.history), share)
    return max(errors.values(), default=math.nan)


def path_of(folder: str, layout: Layout, kind: str) -> str:
    return f"{folder}/{kind}-{layout}"


def fresh(kind: str = "VeLO", **changes: Any) -> Run:
    """A run of one process that has not begun, from other parameters."""
    return Run(PLAIN, kind, None, seed=1, **changes)


def tensors_of(groups: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        f"group {i}.{key}": value
        for i, group in enumerate(groups)
        for key, value in group.items()
        if key != "params"
    }


def snapshot(run: Run) -> dict[str, Any]:
    """This rank's parameters, state and settings."""
    state = {
        f"{i}.{name}": t
        for i, s in enumerate(run.optimizer.state.values())
        for name, t in s.items()
    }
    return {**run.params(), **state, **tensors_of(run.optimizer.param_groups)}


def run_differences(a: Run, b: Run, steps: int) -> list[str]:
    """What differs after the same further steps, this rank's pieces and all parameters."""
    for run in (a, b):
        run.advance(steps)
    return differing(snapshot(a), snapshot(b))

"""What a step asks of the host, without a GPU: no copy to or from the device, no wait, no more
operations for more tensors.

The step runs on meta tensors, which stand in for a GPU: they have no values to read, their device
is not the host's, and all code takes the way it takes on a GPU, the compiled passes included (their
fake implementations). A dispatch mode sees every operation. test_gpu.py asks the same of a GPU
itself.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pylo_dist.core.shards import TensorShard
from pylo_dist.layouts import plain
from pylo_dist.maths import compiled
from pylo_dist.optimizer import learned
from pylo_dist.testing import run_virtual
from support.optimizers import Roles, cases

SHAPES = {
    "matrix": (6, 5),
    "embedding": (11, 4),
    "bias": (7,),
    "scalar": (),
    "conv": (3, 4, 2, 2),
    "slender": (64, 4),
}
# what would make the host wait, or brings data of the host to the device
FORBIDDEN = (
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "masked_select",
    "unique",
    "lift_fresh",
    "_pin_memory",
)
BUILD = cases(Roles(widths={"matrix": 2.0}, embedding="embedding"), able="kernels")
WAYS: dict[str, tuple[str, dict[str, Any]]] = {  # through a step: an optimizer and its settings
    **{name: (name, {}) for name in BUILD},
    "CELO2, scaled": ("CELO2", {"param_scale_mult": True}),
    "CELO2 without Newton-Schulz": ("CELO2", {"orthogonalize": False}),
    "CELO2 without Newton-Schulz, scaled": (
        "CELO2",
        {"orthogonalize": False, "param_scale_mult": True},
    ),
    "AdafacLO, halved": ("AdafacLO", {"state_dtype": "bfloat16"}),
    "CELO2, halved": ("CELO2", {"state_dtype": "bfloat16"}),
}
# several, or not marked as what they are
VIEWS = ("split", "split_with_sizes", "unbind", "_unsafe_view", "detach")


class Calls(TorchFunctionMode):
    """Collects calls of torch's Python functions that read host data, of which a meta tensor leaves
    no trace below.
    """

    def __init__(self, wrong: list[str]) -> None:
        super().__init__()
        self.wrong = wrong

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func in (torch.tensor, Tensor.new_tensor) or (
            func is torch.as_tensor and not isinstance(args[0], Tensor)
        )
        index = args[1] if func in (Tensor.__getitem__, Tensor.__setitem__) else ()
        listed = any(
            isinstance(part, (list, range))
            for part in (index if isinstance(index, tuple) else (index,))
        )
        assigned = func is Tensor.__setitem__ and not isinstance(args[2], Tensor)
        if made or listed or assigned:
            self.wrong.append(f"{func.__name__} at {_line()}")
        return func(*args, **(kwargs or {}))


class Watched(TorchDispatchMode):
    """Collects the operations, and those that mix the host's memory with the device's.

    Attributes:
        launched: how often each line of the package called an operation that is no view.
        views: how many were.
        wrong: the offences.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()
        self.views = 0
        self.wrong: list[str] = []
        self._calls = Calls(self.wrong)

    def __enter__(self) -> Watched:
        self._calls.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, name = func.name().split(".")[0].split("::")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        flags = (
            name == "copy_"
            and args[0].device.type == "cpu"
            and args[1].numel() == 5
            and args[1].dtype == torch.bool
        )
        # the flags of the step, into pinned memory
        out = args[0] if flags else func(*args, **kwargs)
        devices = {x.device.type for x in tensors} | {
            x.device.type for x in tree_leaves(out) if isinstance(x, Tensor)
        }
        # tables: host
        if (name in FORBIDDEN or len(devices) > 1) and not flags and namespace != "pylo_dist":
            self.wrong.append(f"{func.name()} on {sorted(devices)} at {_line()}")
        if func.is_view or name in VIEWS:
            self.views += 1
        else:
            self.launched[_line()] += 1
        return out


def _line() -> str:
    frame: Any = sys._getframe()
    while frame and "pylo_dist/" not in frame.f_code.co_filename.replace("\\", "/"):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "outside of the package"


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors are let in and have kernels."""
    if compiled.library("cpu"):
        pytest.skip(compiled.library("cpu"))  # the fake implementations come with it
    monkeypatch.setattr(plain, "check_param", lambda *args: None)
    # compared between ranks: it prints tensors
    monkeypatch.setattr(learned, "group_settings", lambda groups: [])
    monkeypatch.setattr(compiled, "servable", lambda *args: compiled.enabled())


def build(name: str, tensors: int, **kwargs: Any) -> tuple[Any, list[torch.nn.Parameter]]:
    params = {
        f"{fqn}{i or ''}": torch.nn.Parameter(torch.empty(shape, device="meta"))
        for i in range(tensors)
        for fqn, shape in SHAPES.items()
    }
    named = list(params.items())
    half = len(named) // 2
    groups = [{"params": named[:half], "lr": 0.5}, {"params": named[half:], "max_grad_norm": 0.5}]
    optimizer = BUILD[name].build(groups if tensors == 1 else named, **kwargs)
    optimizer._steps_called = 0  # VeLO reads it from the device before its first step
    return optimizer, list(params.values())


def step(optimizer: Any, params: list[torch.nn.Parameter]) -> Watched:
    for p in params:
        p.grad = torch.empty_like(p)
    loss = torch.ones((), device="meta")
    with Watched() as watched:
        optimizer.step(loss)
    return watched


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "PyTorch"])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_neither_waits_nor_copies(way: str, kernels: bool) -> None:
    """With a schedule, clipping, two groups and a bad loss possible; whichever way the last step
    was other than this one.
    """
    name, settings = WAYS[way]
    with compiled.use_kernels(kernels):
        for kwargs in ({}, {"nonfinite": "skip"}, {"nonfinite": "allow"}) if kernels else ({},):
            optimizer, params = build(name, 1, **settings, **kwargs)
            step(optimizer, params)
            for rate in (0.25, torch.empty((), device="meta")):
                for group in optimizer.param_groups:
                    group["lr"] = rate
                assert not step(optimizer, params).wrong
            with Watched() as watched:
                optimizer.stats()
            assert not watched.wrong


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("way", WAYS)
def test_operations_do_not_grow_with_the_tensors(way: str, figures: list[str]) -> None:
    """With compiled passes; each tensor has some views, which launch nothing."""
    name, settings = WAYS[way]
    counts, views = {}, {}
    for tensors in (2, 50):
        optimizer, params = build(name, tensors, **settings)
        step(optimizer, params)
        watched = step(optimizer, params)
        assert not watched.wrong
        counts[tensors], views[tensors] = watched.launched, watched.views
    grown = {
        line: counts[50][line] - counts[2][line]
        for line in counts[50]
        if counts[50][line] != counts[2][line]
    }
    assert not grown
    per_tensor = (views[50] - views[2]) / (48 * len(SHAPES))
    assert per_tensor <= 12, per_tensor
    figures.append(
        f"{way} | {sum(counts[50].values())} operations a step for any number of tensors, "
        f"{per_tensor:.1f} views each"
    )


@pytest.mark.skipif(bool(compiled.library("cpu")), reason=compiled.library("cpu"))
@pytest.mark.parametrize("way", ["CELO2, scaled", "CELO2 without Newton-Schulz, scaled"])
def test_operations_do_not_grow_with_cut_tensors(way: str, figures: list[str]) -> None:
    """The same of tensors cut within rows or along columns, on virtual ranks, which share the
    matrices of Newton-Schulz.
    """
    name, settings = WAYS[way]
    case = BUILD[name]
    launched = {}
    for tensors in (6, 18):
        shapes = {f"{fqn}{i}": shape for fqn, shape in SHAPES.items() for i in range(tensors)}
        cuts = {fqn: cut(fqn, shape) for fqn, shape in shapes.items()}
        params = {fqn: torch.ones(shape) for fqn, shape in shapes.items()}
        with Watched() as watched:
            run = run_virtual(case.face, params, cuts, [params], **{**case.arguments, **settings})
        assert run.exchanges == [0 if settings.get("orthogonalize") is False else 2]
        # of a step, and not of making and cutting tensors or the compiled passes' tables
        work = ("optim/", "maths/", "optimizer/engine.py")
        counted = {
            k: n
            for k, n in watched.launched.items()
            if any(part in k for part in work) and "compiled.py" not in k
        }
        launched[tensors] = Counter(counted)
    lines = launched[6].keys() | launched[18].keys()
    grown = {
        line: (launched[6][line], launched[18][line])
        for line in lines
        if launched[6][line] != launched[18][line]
    }
    assert not grown
    figures.append(
        f"{way} | {launched[18].total()} operations in the first step of 3 virtual ranks for any "
        "number of tensors"
    )


def cut(fqn: str, shape: tuple[int, ...]) -> list[TensorShard]:
    """In three, unevenly: matrices along columns, others somewhere."""
    numel, last = math.prod(shape), shape[-1] if shape else 0
    if fqn.startswith(("matrix", "conv")):
        return [
            TensorShard.block(fqn, shape, len(shape) - 1, a, b)
            for a, b in ((0, 1), (1, 2), (2, last))
        ]
    return [
        TensorShard.interval(fqn, shape, a, b)
        for a, b in ((0, numel // 3), (numel // 3, numel // 2), (numel // 2, numel))
    ]


def test_the_watch_sees_what_it_looks_for() -> None:
    on_device = torch.empty(3, device="meta")
    offences = (
        lambda: on_device.copy_(torch.tensor([1.0, 2.0, 3.0])),
        lambda: torch.tensor([1.0, 2.0, 3.0], device="meta"),
        lambda: torch.tensor([1.0, 2.0, 3.0]).to("meta"),
        lambda: torch.as_tensor(0.5, device="meta"),
        lambda: on_device[[0, 2]],
        lambda: on_device.new_tensor([1.0]),
        lambda: on_device * torch.ones(3),
        lambda: on_device[0].copy_(torch.ones(())),
        lambda: on_device.__setitem__(0, 0.5),
    )
    for offence in offences:
        with Watched() as watched:
            try:
                offence()
            except RuntimeError:  # a meta tensor refuses some by itself
                continue
        assert watched.wrong, offence
    for read in (
        lambda: bool(on_device.sum()),
        lambda: on_device.tolist(),
        lambda: on_device.nonzero(),
        lambda: on_device.cpu(),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)), Watched():
            read()
    with Watched() as watched:
        torch.where(on_device > 0, 0.0, on_device[1:2].fill_(2.0)).add_(1.0)
    assert not watched.wrong

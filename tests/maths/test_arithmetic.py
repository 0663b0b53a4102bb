"""What a step computes and what it refuses: non-finite gradients, clipping, decay, scratch memory,
no waiting for a device.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pylo_dist
from pylo_dist.maths import compiled, reference
from pylo_dist.optimizer import engine
from pylo_dist.testing import layout_error
from support.optimizer_cases import (
    adafac,
    after,
    everything,
    make_params,
    same,
    set_gradients,
    train,
    values,
)

# ----------------------------------------------------------------------------- non-finite gradients


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mode", ["error", "skip"])
@pytest.mark.parametrize("victim", ["wide", "scalar"])
def test_a_step_that_is_not_taken_leaves_no_trace(value: float, mode: str, victim: str) -> None:
    named = make_params()
    optimizer = adafac(named, nonfinite=mode, max_grad_norm=0.1)
    train(optimizer, named, 0, 1)
    twin, twin_named = copy.deepcopy((optimizer, named))
    before = everything(optimizer)
    set_gradients(named, 7)
    grad = dict(named)[victim].grad
    assert grad is not None
    grad.view(-1)[-1] = value
    if mode == "error":
        with pytest.raises(
            pylo_dist.NonFiniteGradientError,
            match=f"gradient of '{victim}' holds inf or NaN.*not taken",
        ):
            optimizer.step()
    else:
        optimizer.step()
    assert same(everything(optimizer), before)
    for row in optimizer.stats().values():
        assert not row["update_ratio"].isnan()
    train(optimizer, named, 1, 3)
    train(twin, twin_named, 1, 3)
    assert same(everything(optimizer), everything(twin))


def test_the_error_names_up_to_five_parameters() -> None:
    named = make_params({f"layer{i}": (2, 3) for i in range(7)})
    optimizer = adafac(named)
    set_gradients(named, 0)
    for _, param in named:
        assert param.grad is not None
        param.grad[0, 0] = float("nan")
    with pytest.raises(pylo_dist.NonFiniteGradientError, match=r"'layer0', .* 'layer4' and 2 more"):
        optimizer.step()


def test_allow_lets_nan_through() -> None:
    named = make_params()
    optimizer = adafac(named, nonfinite="allow")
    train(optimizer, named, 0, 1)
    set_gradients(named, 1)
    grad = named[2][1].grad
    assert grad is not None
    grad[1, 1] = float("nan")
    optimizer.step()
    assert bool(named[2][1].isnan().all())  # through the norms it reaches its whole tensor
    assert all(bool(p.isfinite().all()) for fqn, p in named if fqn != "wide")
    assert int(optimizer.param_groups[0]["step"]) == 2


# --------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("max_norm", [0.02, 1e-4, 100.0])
@pytest.mark.parametrize("clip", ["global", "per_tensor"])
def test_clipping_equals_torchs_before_an_unclipped_step(clip: str, max_norm: float) -> None:
    """In float64, to 1e-12: the same formula, but the squares are added in another order."""
    named, other = make_params(dtype=torch.float64), make_params(dtype=torch.float64)
    clipped, plain = adafac(named, max_grad_norm=max_norm, clip=clip), adafac(other)
    for step in range(3):
        set_gradients(named, step)
        set_gradients(other, step)
        tensors = [p for _, p in other]
        norm = torch.nn.utils.get_total_norm([p.grad for p in tensors if p.grad is not None])
        for part in [tensors] if clip == "global" else [[p] for p in tensors]:
            torch.nn.utils.clip_grad_norm_(part, max_norm)
        clipped.step()
        plain.step()
        torch.testing.assert_close(clipped.grad_norm, norm, rtol=1e-12, atol=0)
        wanted = everything(plain)
        for key, tensor in everything(clipped).items():
            torch.testing.assert_close(tensor, wanted[key], rtol=1e-12, atol=1e-14)
    assert same(values(named), after_double(3)) == (max_norm == 100.0)


def after_double(steps: int) -> dict[str, Tensor]:
    named = make_params(dtype=torch.float64)
    train(adafac(named), named, 0, steps)
    return values(named)


def test_clipping_leaves_the_gradients_alone() -> None:
    named = make_params()
    optimizer = adafac(named, max_grad_norm=1e-3)
    set_gradients(named, 0)
    before = {fqn: p.grad.clone() for fqn, p in named if p.grad is not None}
    optimizer.step()
    assert same(before, {fqn: p.grad for fqn, p in named if p.grad is not None})


def test_weight_decay_follows_the_step_and_reads_the_new_parameter() -> None:
    named, other = make_params(dtype=torch.float64), make_params(dtype=torch.float64)
    train(adafac(named, lr=0.5, weight_decay=0.2), named, 0, 1)
    train(adafac(other, lr=0.5), other, 0, 1)
    for (_, decayed), (_, plain) in zip(named, other, strict=True):
        # one rounding of the product and one of the difference on either side
        torch.testing.assert_close(
            decayed.detach(), plain.detach() * (1.0 - 0.5 * 0.2), rtol=1e-15, atol=0
        )


def test_lr_zero_changes_state_only() -> None:
    named = make_params()
    before = values(named)
    optimizer = adafac(named, lr=0.0, weight_decay=0.5)
    train(optimizer, named, 0, 2)
    assert same(values(named), before)
    assert all(bool(t.any()) for state in optimizer.state.values() for t in state.values())


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are made chunk by chunk; where the cuts fall changes only the order of the sums (the
    layout tolerance).
    """
    shapes: dict[str, tuple[int, ...]] = {
        "matrix": (150, 120),
        "vector": (17000,),
        "rank3": (3, 80, 75),
        "long": (1, 16500),
    }
    assert all(torch.Size(shape).numel() > reference.CHUNK_CPU for shape in shapes.values())
    results = []
    for size in (reference.CHUNK_CPU, 1 << 20, 777):
        monkeypatch.setattr(reference, "CHUNK_CPU", size)
        named = make_params(shapes)
        optimizer = adafac(named, weight_decay=0.01)
        history = [values(named)]
        for step in range(2):
            train(optimizer, named, step, step + 1)
            history.append(values(named))
        results.append((history, {fqn: dict(optimizer.state[p]) for fqn, p in named}))
    (wanted, wanted_state), *others = results
    changes = {
        f: torch.stack([(b[f] - a[f]).abs().max() for a, b in pairwise(wanted)]).max()
        for f in shapes
    }
    for history, state in others:
        assert max(layout_error(history[-1], wanted[-1], changes).values()) <= 1.0
        for fqn in shapes:
            largest = {name: t.abs().max() for name, t in wanted_state[fqn].items()}
            assert max(layout_error(state[fqn], wanted_state[fqn], largest).values()) <= 1.0, fqn


SCRATCH = """
import resource, torch, pylo_dist
from pylo_dist.optim.adafac import ARCHITECTURE as SMALL_FC
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
tensors = {name: torch.zeros(shape) for name, shape in SMALL_FC.shapes.items()}
small = torch.nn.Parameter(torch.zeros(8, 8))
small.grad = torch.ones(8, 8)
pylo_dist.AdafacLO([small], weights=tensors, max_grad_norm=1.0).step()
p = torch.nn.Parameter(torch.ones(1024, 2048))
p.grad = torch.ones(1024, 2048)
optimizer = pylo_dist.AdafacLO([p], weights=tensors, max_grad_norm=1.0, weight_decay=0.1)
for state in optimizer.state.values():
    for tensor in state.values():
        tensor.fill_(0.5)  # touch it: zeros have no memory yet
before = peak()
optimizer.step()
print(peak() - before)
"""


def test_scratch_stays_bounded(figures: list[str]) -> None:
    """A step on 2 Mi elements: all 39 features of a float32 tensor would be 312 MB. Peak memory of
    a process of its own.
    """
    done = subprocess.run(
        [sys.executable, "-c", SCRATCH], capture_output=True, text=True, timeout=120, check=True
    )
    used = float(done.stdout)
    figures.append(f"scratch of a step on 1024 x 2048 in float32: {used:.0f} MB")
    assert used < 256


def test_scratch_on_a_gpu_is_bounded_by_arithmetic() -> None:
    """Per element of a chunk: 28 features and two hidden layers of 32 in the widest state dtype,
    the largest float64 copies (15 rows and their squares), and a dozen single rows."""
    numbers = 28 + 32 + 32 + 2 * 15 + 12
    assert reference.CHUNK_GPU * numbers * 4 <= 256e6
    assert reference.CHUNK_CPU * numbers * 8 <= 256e6


class NoHostReads(TorchDispatchMode):
    """Fails on every operation that would make the host wait for a device, or copy host data to
    it.
    """

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "item",
        "is_nonzero",
        "equal",
        "masked_select",
        "unique",
        "lift_fresh",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in self.FORBIDDEN, f"{name} makes the host wait"
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device() -> None:
    named = make_params()
    optimizer = adafac(
        named, nonfinite="skip", max_grad_norm=0.05, weight_decay=0.1, lr=torch.tensor(0.5)
    )
    train(optimizer, named, 0, 1)  # the first step may bring constants to the device
    set_gradients(named, 1)
    rule_step = type(optimizer.rule).step

    def watched(rule: Any, batch: Any) -> Iterator[Any]:
        generator = rule_step(rule, batch)
        while True:
            with NoHostReads():
                request = next(generator, None)
            if request is None:
                return
            yield request

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(optimizer.rule), "step", watched)
        optimizer.step()
        with NoHostReads():
            optimizer.stats()
    assert int(optimizer.param_groups[0]["step"]) == 2
    assert same(values(named), after(2, max_grad_norm=0.05, weight_decay=0.1, lr=0.5))
    with pytest.raises(AssertionError, match="makes the host wait"), NoHostReads():
        bool(torch.ones(1).sum() > 0)


def test_the_judgement_does_not_wait_either() -> None:
    """The engine's own part: presence and bounds are brought to the device when they change."""
    named = make_params()
    optimizer = adafac(named, nonfinite="skip", max_grad_norm=0.05)
    train(optimizer, named, 0, 1)
    set_gradients(named, 1)
    with NoHostReads():
        optimizer.step()
    assert same(values(named), after(2, max_grad_norm=0.05))


@pytest.mark.parametrize("kernels", [True, False])
def test_a_model_made_double_after_its_optimizer_is_refused(kernels: bool) -> None:
    """State is float32 for all other precisions, between which a model may change."""
    model = nn.Linear(3, 2)
    optimizer = adafac(list(model.named_parameters()))
    with compiled.use_kernels(kernels):
        for convert in (model.bfloat16, model.float):
            convert()
            model(torch.ones(1, 3, dtype=model.weight.dtype)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.double()
        before = everything(optimizer)
        for _ in range(2):
            model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
            with pytest.raises(
                ValueError,
                match=r"'weight' is torch.float64 now, and its state torch.float32: call model",
            ):
                optimizer.step()
        assert same(everything(optimizer), before)
        model.float()
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()


@pytest.fixture
def _host_asks_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: flags of a step are looked at by the next one."""
    begin = engine._PendingErrors.__init__

    def later(self: Any, *args: Any) -> None:
        begin(self, *args)
        self.at_once = False

    monkeypatch.setattr(engine._PendingErrors, "__init__", later)


@pytest.mark.usefixtures("_host_asks_later")
@pytest.mark.parametrize("by", ["step", "state_dict"])
def test_on_a_gpu_the_next_call_raises(by: str) -> None:
    named = make_params()
    optimizer = adafac(named)
    train(optimizer, named, 0, 1)
    before = everything(optimizer)
    set_gradients(named, 1)
    dict(named)["bias"].grad[0] = math.nan  # type: ignore[index]
    optimizer.step()
    assert same(everything(optimizer), before)
    set_gradients(named, 1)
    with pytest.raises(pylo_dist.NonFiniteGradientError, match="'bias' holds"):
        getattr(optimizer, by)()
    assert same(everything(optimizer), before)
    train(optimizer, named, 1, 3)
    assert same(values(named), after(3))
    optimizer.state_dict()


@pytest.mark.usefixtures("_host_asks_later")
def test_on_a_gpu_the_next_step_warns_that_there_was_no_gradient() -> None:
    named = make_params()
    optimizer = adafac(named)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pylo_dist.NoGradientWarning)
        optimizer.step()
    set_gradients(named, 0)
    with pytest.warns(pylo_dist.NoGradientWarning, match="a step of AdafacLO found no gradient"):
        optimizer.step()


@pytest.mark.usefixtures("_host_asks_later")
def test_errors_of_replayed_steps_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step does not ask; what went wrong stays on the device until somebody does,
    through good steps that follow.
    """
    named = make_params()
    optimizer = adafac(named)
    with monkeypatch.context() as capture:
        capture.setattr(engine, "is_capturing", lambda device: True)
        set_gradients(named, 0)
        with pytest.raises(ValueError, match="before the first one: take one outside"):
            optimizer.step()
    train(optimizer, named, 0, 1)
    with monkeypatch.context() as capture:
        capture.setattr(engine, "is_capturing", lambda device: True)
        set_gradients(named, 1)
        dict(named)["bias"].grad[0] = math.inf  # type: ignore[index]
        optimizer.step()
        train(optimizer, named, 1, 2)
    with pytest.raises(pylo_dist.NonFiniteGradientError, match="'bias' holds"):
        optimizer.state_dict()
    assert same(values(named), after(2))
    train(optimizer, named, 2, 3)
    optimizer.state_dict()
    assert same(values(named), after(3))


def test_a_captured_step_outlives_neither_new_groups_nor_loaded_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A graph replays on the memory it was captured with, and nobody can ask it: the exchange
    itself warns, once. That memory stays.
    """
    named = make_params()
    optimizer = adafac(named)
    train(optimizer, named, 0, 1)
    saved = optimizer.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)  # nothing was captured
    for exchange in (
        lambda: optimizer.load_state_dict(saved),
        lambda: optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(3)))]}),
    ):
        train(optimizer, named, 1, 2)
        with monkeypatch.context() as capture:
            capture.setattr(engine, "is_capturing", lambda device: True)
            set_gradients(named, 1)
            optimizer.step()
        captured = weakref.ref(optimizer._ready())
        with pytest.warns(UserWarning, match="capture it again") as warned:
            exchange()
        assert len(warned) == 1
        assert captured() not in (None, optimizer._ready())  # a replay writes its memory
    saved = optimizer.state_dict()
    train(optimizer, named, 1, 2)
    with monkeypatch.context() as capture:
        capture.setattr(engine, "is_capturing", lambda device: True)
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="capture it again"):
            optimizer.load_state_dict(saved)
        assert int(optimizer.param_groups[0]["step"]) == int(saved["param_groups"][0]["step"])
        train(optimizer, named, 1, 2)  # goes on from what was loaded, and it has been said

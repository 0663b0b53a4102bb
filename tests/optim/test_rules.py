"""What is particular to each rule: VeLO's loss and run, MuLO's multipliers, ELO's NaN, CELO2's
routing. What holds for all: tests/contracts.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylo_dist
from pylo_dist.optim import velo
from support.optimizers import CELO2, SMALL_FC, VELO, Roles, cases

BUILD = cases(Roles(widths={"matrix": 2.0}, embedding="embedding"))


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "matrix": (6, 5),
        "embedding": (11, 4),
        "bias": (7,),
        "scalar": (),
        "conv": (3, 4, 2, 2),
    }
    return {
        fqn: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for fqn, shape in shapes.items()
    }


def build(name: str, params: dict[str, nn.Parameter], **changes: Any) -> Any:
    return BUILD[name].build(list(params.items()), **changes)


def advance(optimizer: Any, params: dict[str, nn.Parameter], first: int, last: int) -> None:
    for t in range(first, last):
        generator = torch.Generator().manual_seed(100 + t)
        for p in params.values():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step(torch.tensor(2.0 / (t + 1)))


def everything(optimizer: Any, params: dict[str, nn.Parameter]) -> list[Tensor]:
    """Parameters, state and run-global values, copied."""
    found = [p.detach().clone() for p in params.values()]
    found += [t.clone() for p in params.values() for t in optimizer.state[p].values()]
    found += [
        v.clone() for g in optimizer.param_groups for v in g.values() if isinstance(v, Tensor)
    ]
    return found


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_gradient_whose_square_overflows_is_no_number() -> None:
    """1e20 is a float32, its square is not: unclipped it would turn its tensor's factors, and then
    the parameters, to NaN.
    """
    for limit, raises in ((None, True), (1.0, False)):
        params = {"w": nn.Parameter(torch.ones(4, 4))}
        optimizer = build("AdafacLO", params, max_grad_norm=limit)
        params["w"].grad = torch.ones(4, 4)
        params["w"].grad[1, 2] = 1e20
        if raises:
            with pytest.raises(pylo_dist.NonFiniteGradientError, match="'w'"):
                optimizer.step()
        else:
            optimizer.step()
        assert all(t.isfinite().all() for t in everything(optimizer, params))


# --------------------------------------------------------------------------------------------- VeLO


def test_velo_depends_on_the_loss() -> None:
    runs = []
    for factor in (1.0, -1.0):
        params = tensors()
        optimizer = build("VeLO", params)
        for t in range(6):
            for p in params.values():
                p.grad = torch.ones_like(p)
            optimizer.step(torch.tensor(5.0 + factor * t))
        runs.append(params["matrix"].detach().clone())
        assert float(optimizer.param_groups[0]["loss_means"][0]) > 0
    assert not torch.equal(*runs)


def test_velo_without_a_loss_says_how_to_give_it() -> None:
    params = tensors()
    optimizer = build("VeLO", params)
    before = everything(optimizer, params)
    with pytest.raises(
        ValueError, match=r"reads the training loss, and some rank gave none: call step\(loss\)"
    ):
        optimizer.step()
    with pytest.raises(ValueError, match=r"the loss has shape \(2,\)"):
        optimizer.step(torch.ones(2))
    assert same(before, everything(optimizer, params))


@pytest.mark.parametrize("mode", ["error", "skip"])
def test_a_loss_that_is_no_number_is_no_step(mode: str) -> None:
    params = tensors()
    optimizer = build("VeLO", params, nonfinite=mode)
    advance(optimizer, params, 0, 2)
    before = everything(optimizer, params)
    if mode == "error":
        with pytest.raises(pylo_dist.NonFiniteGradientError, match="the loss is inf or NaN"):
            optimizer.step(torch.tensor(float("nan")))
    else:
        optimizer.step(torch.tensor(float("nan")))
    assert same(before, everything(optimizer, params))


def test_velo_at_the_end_of_its_run() -> None:
    params = tensors()
    optimizer = build("VeLO", params, num_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advance(optimizer, params, 0, 3)
    with pytest.warns(UserWarning, match=r"taken all num_steps=3 steps.*extend\(num_steps\)"):
        advance(optimizer, params, 3, 4)
    at = torch.tensor([0.5, 1.0])
    clamped = optimizer.rule._fraction(optimizer.param_groups[0], at)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        advance(optimizer, params, 4, 6)
    assert torch.equal(clamped, optimizer.rule._fraction(optimizer.param_groups[0], at))
    optimizer.extend(100)
    assert optimizer.state_dict()["param_groups"][0]["num_steps"] == 100
    assert not torch.equal(clamped, optimizer.rule._fraction(optimizer.param_groups[0], at))
    with pytest.raises(ValueError, match="num_steps=1"):
        optimizer.extend(1)


def test_velo_warns_where_it_is_known_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="150000"):
        build("VeLO", tensors(), num_steps=150_001)
    assert velo.LARGEST_MODEL == 600_000_000
    monkeypatch.setattr(velo, "LARGEST_MODEL", 1999)
    with pytest.warns(UserWarning, match="VeLO on 2,000 parameters"):
        build("VeLO", {"w": nn.Parameter(torch.zeros(2, 1000))})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": 10.5}, "num_steps=10.5"),
        ({"tie_break": "reference"}, "tie_break='reference'"),
        ({"max_grad_norm": 2000.0}, "max_grad_norm=2000.0: wanted at most 1000"),
    ],
)
def test_velo_refuses(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("VeLO", tensors(), **kwargs)


def test_velos_ties_are_the_references_on_the_transposed_matrix() -> None:
    generator = torch.Generator().manual_seed(3)
    start, grads = torch.randn(6, 6, generator=generator), torch.randn(5, 6, 6, generator=generator)
    results = []
    for tie_break, transpose in (("torch", False), ("as_given", True)):
        p = nn.Parameter((start.mT if transpose else start).clone().double())
        optimizer = pylo_dist.VeLO([p], weights=VELO, num_steps=50, tie_break=tie_break)
        for grad in grads:
            p.grad = (grad.mT if transpose else grad).double()
            optimizer.step(torch.tensor(1.0))
        results.append(p.detach().mT if transpose else p.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-14)


def test_velos_loss_buffer_goes_on_while_its_first_group_is_frozen() -> None:
    params = tensors()
    names = list(params)
    groups = [{"params": [(n, params[n]) for n in half]} for half in (names[:2], names[2:])]
    for name in names[:2]:
        params[name].requires_grad_(False)
    optimizer = BUILD["VeLO"].build(groups)
    advance(optimizer, params, 0, 3)
    for name in names[:2]:
        params[name].requires_grad_(True)
    advance(optimizer, params, 3, 6)
    reference_params = tensors()
    reference = build("VeLO", reference_params)
    advance(reference, reference_params, 0, 6)
    for group in optimizer.param_groups:
        assert torch.equal(group["loss_means"], reference.param_groups[0]["loss_means"])


# --------------------------------------------------------------------------------------------- MuLO


class InfShape:
    """What mup.set_base_shapes leaves on a parameter, as far as MuLO reads it."""

    def __init__(self, ninf: int, width_mult: float) -> None:
        self._ninf, self._width_mult = ninf, width_mult

    def ninf(self) -> int:
        return self._ninf

    def width_mult(self) -> float:
        return self._width_mult


def test_mulo_reads_infshape_and_survives_sharding() -> None:
    results = []
    for sharded in (False, True):
        params = tensors()
        for p in params.values():
            p.infshape = InfShape(0, 1.0)
        params["matrix"].infshape, params["embedding"].infshape = InfShape(2, 4.0), InfShape(1, 4.0)
        if sharded:
            optimizer = pylo_dist.ZeroOptimizer(
                list(params.items()), pylo_dist.MuLO, weights=SMALL_FC
            )
        else:
            optimizer = pylo_dist.MuLO(list(params.items()), weights=SMALL_FC)
        mults = optimizer.param_groups[0]["width_mults"]
        assert mults == {"matrix": 4.0, "embedding": 1.0, "bias": 1.0, "scalar": 1.0, "conv": 1.0}
        advance(optimizer, params, 0, 3)
        results.append(params["matrix"].detach().clone())
    assert torch.equal(*results)


def test_mulo_reads_infshape_of_late_groups_under_sharding() -> None:
    params = tensors()
    for p in params.values():
        p.infshape = InfShape(2, 8.0)
    optimizer = pylo_dist.ZeroOptimizer(
        [("matrix", params["matrix"])], pylo_dist.MuLO, weights=SMALL_FC
    )
    optimizer.add_param_group({"params": [("conv", params["conv"])]})
    assert optimizer.param_groups[1]["width_mults"] == {"conv": 8.0}


def test_mulo_divides_the_step_by_the_multiplier() -> None:
    moved = []
    for mult in (1.0, 4.0):
        params = tensors(torch.float64)
        start = params["matrix"].detach().clone()
        optimizer = build("MuLO", params, width_mults={"matrix": mult})
        advance(optimizer, params, 0, 1)
        moved.append(params["matrix"].detach() - start)
    torch.testing.assert_close(moved[0] / 4.0, moved[1], rtol=1e-10, atol=1e-15)


def test_mulo_refuses_what_it_cannot_place() -> None:
    params = tensors()
    with pytest.raises(ValueError, match=r"'matrix' has no infshape.*set_base_shapes"):
        pylo_dist.MuLO(list(params.items()), weights=SMALL_FC)
    with pytest.raises(ValueError, match=r"width_mults names \['missing'\]"):
        pylo_dist.MuLO(list(params.items()), weights=SMALL_FC, width_mults={"missing": 2.0})
    with pytest.raises(ValueError, match=r"width_mults\['matrix'\]=0"):
        pylo_dist.MuLO(list(params.items()), weights=SMALL_FC, width_mults={"matrix": 0.0})
    params["matrix"].infshape = InfShape(2, 2.0)
    params["matrix"].infshape.shape = lambda: [0]
    with pytest.raises(ValueError, match=r"infshape was made for \(0,\).* pass width_mults="):
        pylo_dist.MuLO([("matrix", params["matrix"])], weights=SMALL_FC)
    params["conv"].infshape = InfShape(3, 2.0)
    with pytest.raises(ValueError, match="'conv' has 3 dimensions that grow"):
        pylo_dist.MuLO([("conv", params["conv"])], weights=SMALL_FC)


# --------------------------------------------------------------------------------------- ELO, CELO2


def test_elo_replaces_nan_only_when_allowed() -> None:
    """Without clipping the entry counts as 0; with clipping the norm is no number, and nothing of
    the gradient is left.
    """
    results: dict[str, Tensor] = {}
    for case, clip in (
        ("nan", False),
        ("zero entry", False),
        ("nan clipped", True),
        ("all zero", True),
    ):
        params = {"w": nn.Parameter(torch.ones(4, 3))}
        optimizer = build("ELO", params, nonfinite="allow", clip_grad=clip)
        params["w"].grad = torch.arange(12.0).view(4, 3)
        if case == "all zero":
            params["w"].grad.zero_()
        else:
            params["w"].grad[1, 1] = 0.0 if case == "zero entry" else float("nan")
        optimizer.step()
        results[case] = params["w"].detach().clone()
    assert all(r.isfinite().all() for r in results.values())
    assert torch.equal(results["nan"], results["zero entry"])
    assert torch.equal(results["nan clipped"], results["all zero"])
    assert not torch.equal(results["nan"], results["nan clipped"])


def test_celo2_routes_by_dims_flag_and_pattern() -> None:
    params = tensors()
    groups = [
        {"params": [(n, params[n]) for n in ("matrix", "embedding", "bias", "scalar")]},
        {"params": [("conv", params["conv"])], "is_embedding": True},
    ]
    optimizer = pylo_dist.CELO2(groups, weights=CELO2, embedding_pattern="^embed")
    routes = {row["fqn"]: row["rule"] for row in optimizer.report()}
    assert routes == {
        "matrix": "celo2",
        "embedding": "adamw",
        "bias": "adamw",
        "scalar": "adamw",
        "conv": "adamw",
    }
    assert set(optimizer.state[params["matrix"]]) == {"momentum", "rms", "row", "col"}
    assert set(optimizer.state[params["conv"]]) == {"exp_avg", "exp_avg_sq", "adam_step"}


@pytest.mark.parametrize("name", ["CELO2", "ELO_CELO2"])
def test_adamw_tensors_follow_torch(name: str) -> None:
    """Against torch.optim.AdamW on the same gradients; ELO-CELO2 counts the group's steps, CELO2
    the tensor's own.
    """
    params, other = tensors(torch.float64), tensors(torch.float64)
    optimizer = build(
        name, {"bias": params["bias"]}, weight_decay=0.1, lr=0.01, adam_lr_mult=2.0, clip_grad=False
    )
    reference = torch.optim.AdamW(
        [other["bias"]], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    for t in range(5):
        params["bias"].grad = torch.full((7,), 0.1 * (t + 1), dtype=torch.float64)
        other["bias"].grad = params["bias"].grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(params["bias"], other["bias"], rtol=1e-13, atol=0)
    params["bias"].grad = other["bias"].grad = None
    optimizer.step()
    assert int(optimizer.param_groups[0]["step"]) == 6
    if name == "CELO2":
        assert float(optimizer.state[params["bias"]]["adam_step"]) == 5.0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ns_iters": 0}, "ns_iters=0"),
        ({"adam_betas": (0.9, 1.0)}, "adam_betas"),
        ({"embedding_pattern": "("}, "no regular expression"),
        (
            {"clip_grad": True, "clip_norm": 2000.0},
            "max_grad_norm=2000.0: wanted at most grad_clip_val=1000",
        ),
        ({"rmsmult": -1.0}, "rmsmult=-1.0"),
    ],
)
def test_celo2_refuses(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("CELO2", tensors(), **kwargs)

"""Every optimizer keeps the contract of a torch optimizer.

Background: training code and schedulers were written for torch.optim; every habit they rely on is
one test here, over the list in support/optimizers.py. One process, whole tensors. Unless a test
says otherwise results are compared to the bit: both sides are the same arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylo_dist
from support.optimizer_cases import (
    EVERY,
    build,
    everything,
    loss_of,
    make_params,
    same,
    set_gradients,
    train,
    values,
)
from support.optimizers import OPTIMIZERS

# rates are large here, so that settings show
pytestmark = pytest.mark.filterwarnings("ignore:weight_decay=")
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def after(name: str, steps: int, **changes: Any) -> dict[str, Tensor]:
    """The parameters after so many plain steps."""
    named = make_params(EVERY)
    train(build(name, named, **changes), named, 0, steps)
    return values(named)


def state_of(optimizer: Any, param: nn.Parameter) -> dict[str, Tensor]:
    return {key: t.clone() for key, t in optimizer.state[param].items()}


# --------------------------------------------------------------------------------------------- list


def test_every_face_of_the_package_is_in_the_list() -> None:
    classes = [value for value in vars(pylo_dist).values() if isinstance(value, type)]
    faces = {cls for cls in classes if issubclass(cls, pylo_dist.LearnedOptimizer)}
    listed = {case.face for case in OPTIMIZERS.values() if case.built_in}
    assert faces - {pylo_dist.LearnedOptimizer} == listed


@every_optimizer
def test_the_list_says_what_the_rule_says(name: str) -> None:
    case, optimizer = OPTIMIZERS[name], build(name, make_params(EVERY))
    assert case.needs_loss == optimizer.rule.needs_loss
    assert case.replaces_nonfinite == optimizer.rule.replaces_nonfinite
    assert set(case.cannot) <= {"alone", "kernels", "late", "rest"}
    assert all(case.cannot.values())
    if case.state_as:  # those that stand for it have state of each kind
        others = [build(other, make_params(EVERY)) for other in case.state_as]
        assert kinds_of_state(optimizer) <= set().union(*map(kinds_of_state, others))
        assert set(optimizer.rule.group_state()) <= set().union(
            *(other.rule.group_state() for other in others)
        )


def kinds_of_state(optimizer: Any) -> set[tuple[bool, bool]]:
    """Replicated or not, with several decays or not."""
    fields = [optimizer.state_fields(p).values() for p in optimizer.state]
    return {(f.replicated is None, bool(f.copies)) for of_one in fields for f in of_one}


# --------------------------------------------------------------------------------------------- step


@every_optimizer
def test_closure_runs_under_enable_grad_and_its_loss_is_returned(name: str) -> None:
    named, other = make_params(EVERY), make_params(EVERY)
    optimizer, plain = build(name, named), build(name, other)
    losses = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = sum(p.square().sum() for _, p in named)
        loss.backward()
        losses.append(loss)
        return loss

    with torch.no_grad():  # as some training loops call it
        assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1
    sum(p.square().sum() for _, p in other).backward()
    plain.step(losses[0].detach())
    assert same(everything(optimizer), everything(plain))
    assert not same(values(named), values(make_params(EVERY)))


@every_optimizer
def test_a_loss_may_come_in_every_form(name: str) -> None:
    wanted = after(name, 2)
    calls: list[Callable[[Any, Tensor], Any]] = [
        lambda o, loss: o.step(loss) is loss,
        lambda o, loss: o.step(loss=loss) is loss,
        lambda o, loss: o.step(lambda: loss) is loss,
        lambda o, loss: (o.set_loss(loss), o.step())[1] is None,
    ]
    for call in calls:
        named = make_params(EVERY)
        optimizer = build(name, named)
        for step in range(2):
            set_gradients(named, step)
            assert call(optimizer, loss_of(step))
        assert same(values(named), wanted)


@every_optimizer
def test_a_step_without_a_loss(name: str) -> None:
    """Who reads it says so before anything changes; the others do not miss it."""
    named = make_params(EVERY)
    optimizer = build(name, named)
    before = everything(optimizer)
    set_gradients(named, 0)
    if OPTIMIZERS[name].needs_loss:
        with pytest.raises(ValueError, match="reads the training loss, and some rank gave none"):
            optimizer.step()
        assert same(everything(optimizer), before)
    else:
        optimizer.step()
        assert same(values(named), after(name, 1))


@every_optimizer
def test_step_and_state_hooks_run(name: str) -> None:
    named = make_params(EVERY)
    optimizer = build(name, named)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("step pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("step post"))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("state pre"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda o, state: {**state, "seen": calls.append("load pre")}
    )
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load post"))
    train(optimizer, named, 0, 1)
    state = optimizer.state_dict()
    assert state["mine"] == 1
    optimizer.load_state_dict(state)
    assert calls == ["step pre", "step post", "state pre", "load pre", "load post"]


@every_optimizer
def test_zero_grad_both_ways(name: str) -> None:
    named = make_params(EVERY)
    optimizer = build(name, named)
    set_gradients(named, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for _, p in named)
    optimizer.zero_grad()
    assert all(p.grad is None for _, p in named)


@every_optimizer
def test_callers_under_no_grad(name: str) -> None:
    named = make_params(EVERY)
    optimizer = build(name, named)
    with torch.no_grad():
        train(optimizer, named, 0, 2)
    assert same(values(named), after(name, 2))
    assert all(p.requires_grad and p.is_leaf for _, p in named)
    assert not any(t.requires_grad for state in optimizer.state.values() for t in state.values())


@every_optimizer
def test_grad_scaler_unscales_and_skips(name: str) -> None:
    """The scale is a power of two, so scaling is exact; an overflow is the scaler's to see, before
    the optimizer is called.
    """
    named, plain = make_params(EVERY), make_params(EVERY)
    optimizer, wanted = build(name, named), build(name, plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor in (1.0, float("inf"), 0.5):
        for params in (named, plain):
            for _, param in params:
                param.grad = None
        scaler.scale(factor * sum(p.square().sum() for _, p in named)).backward()
        before = everything(optimizer)
        optimizer.set_loss(torch.tensor(2.0))
        scaler.step(optimizer)
        scaler.update()
        if factor == float("inf"):
            assert same(everything(optimizer), before)
            continue
        (factor * sum(p.square().sum() for _, p in plain)).backward()
        wanted.step(torch.tensor(2.0))
        assert same(everything(optimizer), everything(wanted))


# ---------------------------------------------------------------------------------------- gradients


@every_optimizer
def test_a_missing_gradient_leaves_its_tensor_alone(name: str) -> None:
    """Parameter and state; the step counts, also where no tensor has a gradient."""
    named = make_params(EVERY)
    optimizer = build(name, named)
    train(optimizer, named, 0, 1)
    for step, resting in ((1, {"wide", "bias"}), (2, set(EVERY))):
        before, states = values(named), {fqn: state_of(optimizer, p) for fqn, p in named}
        set_gradients(named, step)
        for fqn, param in named:
            param.grad = None if fqn in resting else param.grad
        optimizer.step(loss_of(step))
        assert {fqn for fqn, p in named if torch.equal(p, before[fqn])} == resting
        rested = {fqn for fqn, p in named if same(state_of(optimizer, p), states[fqn])}
        assert (rested == resting) != ("rest" in OPTIMIZERS[name].cannot)
        for fqn in resting:  # in any case that of its elements
            param = dict(named)[fqn]
            for key, field in optimizer.state_fields(param).items():
                if field.replicated is None:
                    assert torch.equal(optimizer.state[param][key], states[fqn][key]), (fqn, key)
        assert int(optimizer.param_groups[0]["step"]) == step + 1
    assert optimizer.param_groups[0]["step"].dtype == torch.int64


@every_optimizer
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("mode", ["error", "skip"])
def test_a_bad_gradient_changes_no_bit(name: str, mode: str, bad: float) -> None:
    """And the run goes on as if there had been no such step."""
    named, other = make_params(EVERY), make_params(EVERY)
    optimizer, plain = build(name, named, nonfinite=mode), build(name, other)
    train(optimizer, named, 0, 2)
    before = everything(optimizer)
    set_gradients(named, 7)
    dict(named)["conv"].grad[1, 0, 2, 1] = bad
    if mode == "error":
        with pytest.raises(pylo_dist.NonFiniteGradientError, match="'conv'"):
            optimizer.step(torch.tensor(100.0))
    else:
        optimizer.step(torch.tensor(100.0))
    assert same(before, everything(optimizer))
    train(optimizer, named, 2, 3)
    train(plain, other, 0, 3)
    assert same(everything(optimizer), everything(plain))


@every_optimizer
def test_a_bad_gradient_that_is_allowed_stays_in_its_tensor(name: str) -> None:
    named = make_params(EVERY)
    optimizer = build(name, named, nonfinite="allow", clip="per_tensor")
    train(optimizer, named, 0, 2)
    set_gradients(named, 2)
    dict(named)["conv"].grad[1, 0, 2, 1] = float("nan")
    optimizer.step(loss_of(2))
    finite = {fqn for fqn, p in named if p.isfinite().all()}
    assert finite == EVERY.keys() - (set() if OPTIMIZERS[name].replaces_nonfinite else {"conv"})
    assert int(optimizer.param_groups[0]["step"]) == 3


@every_optimizer
def test_the_probe_step_changes_no_bit(name: str) -> None:
    """torch.distributed.checkpoint calls step(closure=None) with zero gradients and lr 0 to have
    state made.
    """
    named = make_params(EVERY)
    optimizer = build(name, named)
    train(optimizer, named, 0, 2)
    before, rates = everything(optimizer), [g["lr"] for g in optimizer.param_groups]
    for _, p in named:
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step(closure=None)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    assert same(before, everything(optimizer))


# ---------------------------------------------------------------------------------------- schedules


@every_optimizer
@pytest.mark.parametrize("tensor_dtype", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_schedulers_set_the_step_size(
    name: str, dtype: torch.dtype, tensor_dtype: torch.dtype | None
) -> None:
    """As torch's AdamW sees it; a rate that is a tensor is the float it holds, to the bit: the step
    size is taken in float64 either way.
    """
    # also where torch promotes like a tensor
    shapes = {**EVERY, **{f"scalar{i}": () for i in range(16)}}
    named, other = make_params(shapes, dtype), make_params(shapes, dtype)
    given = 0.3 if tensor_dtype is None else torch.tensor(0.3, dtype=tensor_dtype)
    rate = float(given)
    optimizer, by_hand = build(name, named, lr=given), build(name, other, lr=rate)
    adamw = torch.optim.AdamW([nn.Parameter(torch.ones(2))], lr=rate)
    schedulers = [  # powers of two are exact in any dtype
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step) for o in (optimizer, adamw)
    ]
    before = values(named)
    for step in range(3):
        assert float(optimizer.param_groups[0]["lr"]) == adamw.param_groups[0]["lr"]
        by_hand.param_groups[0]["lr"] = rate * 0.5**step
        train(optimizer, named, step, step + 1)
        train(by_hand, other, step, step + 1)
        adamw.step()
        for scheduler in schedulers:
            scheduler.step()
        assert same(values(named), values(other))
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor) == (tensor_dtype is not None)
    assert not any(torch.equal(p, before[fqn]) for fqn, p in named)


@every_optimizer
def test_one_cycle(name: str) -> None:
    named = make_params(EVERY)
    adamw = torch.optim.AdamW([nn.Parameter(torch.ones(2))], lr=0.5)
    optimizer = build(name, named, lr=0.5)
    one_cycle = functools.partial(
        torch.optim.lr_scheduler.OneCycleLR, max_lr=0.5, total_steps=4, cycle_momentum=False
    )
    schedulers, rates = [one_cycle(optimizer), one_cycle(adamw)], []
    for step in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        assert rates[-1] == adamw.param_groups[0]["lr"]
        train(optimizer, named, step, step + 1)
        adamw.step()
        for scheduler in schedulers if step < 3 else ():
            scheduler.step()
    assert rates[0] < rates[1]
    assert rates[-1] < 1e-4
    assert not same(values(named), after(name, 4, lr=0.5))


# ------------------------------------------------------------------------------------------- groups


@every_optimizer
def test_groups_have_their_own_settings(name: str) -> None:
    """Each of them has an effect, and a tensor moves as it would in an optimizer of its own."""
    settings = [*OPTIMIZERS[name].groups, {"lr": 0.5}]
    plain = after(name, 3, clip="per_tensor")
    for setting in settings:
        named = make_params(EVERY)
        train(build(name, named, [{"params": named, **setting}], clip="per_tensor"), named, 0, 3)
        assert not same(values(named), plain), setting
    named, alone = make_params(EVERY), make_params(EVERY)
    single = []
    for i, entry in enumerate(alone):
        group = {"params": [entry], **settings[i % len(settings)]}
        single.append(build(name, [entry], [group], clip="per_tensor"))
    groups = [{"params": [entry], **settings[i % len(settings)]} for i, entry in enumerate(named)]
    train(build(name, named, groups, clip="per_tensor"), named, 0, 3)
    for step in range(3):
        set_gradients(alone, step)
        for optimizer in single:
            optimizer.step(loss_of(step))
    assert same(values(named), values(alone)) != ("alone" in OPTIMIZERS[name].cannot)


@every_optimizer
def test_a_groups_rate_is_its_tensors_alone(name: str) -> None:
    """At rate 0 parameters rest, and their state goes on; those of the other group move."""
    named = make_params(EVERY)
    optimizer = build(name, named, [{"params": named[:3], "lr": 0.0}, {"params": named[3:]}])
    before, states = values(named), {fqn: state_of(optimizer, p) for fqn, p in named}
    train(optimizer, named, 0, 2)
    for place, (fqn, param) in enumerate(named):
        assert torch.equal(param, before[fqn]) == (place < 3), fqn
        assert not same(state_of(optimizer, param), states[fqn]), fqn


@every_optimizer
def test_add_param_group_later(name: str) -> None:
    named, alone = make_params(EVERY), make_params(EVERY)
    optimizer = build(name, named[:4], clip="per_tensor")
    train(optimizer, named[:4], 0, 2)
    optimizer.add_param_group({"params": named[4:], "lr": 0.25})
    fields = optimizer.state_fields(named[5][1])
    assert optimizer.state[named[5][1]].keys() == fields.keys()  # at once
    assert fields
    train(optimizer, named, 2, 4)
    assert [int(group["step"]) for group in optimizer.param_groups] == [4, 2]
    first = build(name, alone[:4], clip="per_tensor")
    second = build(name, alone[4:], lr=0.25, clip="per_tensor")
    for step in range(4):
        set_gradients(alone, step)
        first.step(loss_of(step))
        if step >= 2:
            second.step(loss_of(step))
    joins = {"alone", "late"} & OPTIMIZERS[name].cannot.keys()
    assert same(values(named), values(alone)) != bool(joins)


# ----------------------------------------------------------------------- dtypes, layouts and shapes


@every_optimizer
def test_half_precision_parameters_are_rounded_float32_ones(name: str) -> None:
    """A step of bfloat16 parameters is that of their float32 copies, rounded; so is their state,
    which is float32 and survives loading as it is.
    """
    for dtype in (torch.bfloat16, torch.float16):
        named = make_params(EVERY, dtype)
        wide = [(fqn, nn.Parameter(p.detach().float())) for fqn, p in named]
        optimizer, wanted = build(name, named), build(name, wide)
        set_gradients(named, 0)
        for (_, a), (_, b) in zip(named, wide, strict=True):
            b.grad = a.grad.float()
        optimizer.step(loss_of(0))
        wanted.step(loss_of(0))
        for (fqn, a), (_, b) in zip(named, wide, strict=True):
            assert a.dtype == dtype
            assert torch.equal(a, b.to(dtype)), fqn
            assert same(state_of(optimizer, a), state_of(wanted, b)), fqn
        loaded = build(name, make_params(EVERY, dtype))
        for state in optimizer.state.values():
            for tensor in state.values():
                assert tensor.dtype == torch.float32
                tensor.fill_(1001.0)  # in bfloat16 it would be 1000
        loaded.load_state_dict(optimizer.state_dict())
        for state in loaded.state.values():
            assert all(
                t.dtype == torch.float32 and bool((t == 1001.0).all()) for t in state.values()
            )


@every_optimizer
def test_float64_parameters_have_float64_state(name: str) -> None:
    """And their steps are those of float32, but for its roundings."""
    named, narrow = make_params(EVERY, torch.float64), make_params(EVERY)
    optimizer, single = build(name, named), build(name, narrow)
    train(optimizer, named, 0, 1)
    train(single, narrow, 0, 1)
    loaded = build(name, make_params(EVERY, torch.float64))
    loaded.load_state_dict(optimizer.state_dict())
    for of in (optimizer, loaded):
        assert {t.dtype for state in of.state.values() for t in state.values()} == {torch.float64}
    start = values(make_params(EVERY, torch.float64))
    for (fqn, a), (_, b) in zip(named, narrow, strict=True):
        change = (a - start[fqn]).detach().abs().max()
        assert float(change) > 0
        # Newton-Schulz lifts the last bits of what it is given, some 100 times
        slack = 1e-2 * change + 4 * torch.finfo(torch.float32).eps * start[fqn].abs().max()
        assert bool(((a - b.double()).abs() <= slack).all()), fqn


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x.clone()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.clone()


def every_second(x: Tensor) -> Tensor:
    if not x.dim():
        return x.clone()
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 77.0, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def corner(x: Tensor) -> Tensor:
    wide = torch.full([size + 2 for size in x.shape], 77.0, dtype=x.dtype)
    inner = wide[tuple(slice(1, size + 1) for size in x.shape)]
    inner.copy_(x)
    return inner


@every_optimizer
@pytest.mark.parametrize("layout", [transposed, channels_last, every_second, corner])
def test_memory_layout_does_not_matter(layout: Callable[[Tensor], Tensor], name: str) -> None:
    """Parameters and gradients laid out in any way equal their contiguous copies, and memory
    between their elements is kept.
    """
    for gradients in ("like", "contiguous", "odd"):
        plain = make_params(EVERY)
        odd = [(fqn, nn.Parameter(layout(p.detach()))) for fqn, p in plain]
        assert layout is channels_last or not all(p.is_contiguous() for _, p in odd)
        optimizer, wanted = (
            build(name, p, [{"params": p, "weight_decay": 0.1, "max_grad_norm": 0.1}])
            for p in (odd, plain)
        )
        for step in range(2):
            set_gradients(plain, step)
            for (_, a), (_, b) in zip(odd, plain, strict=True):
                if gradients == "like":
                    a.grad = layout(b.grad)
                else:
                    a.grad = b.grad.clone() if gradients == "contiguous" else every_second(b.grad)
            wanted.step(loss_of(step))
            optimizer.step(loss_of(step))
        assert same(values(odd), values(plain))
        for (_, a), (_, b) in zip(odd, plain, strict=True):
            assert same(state_of(optimizer, a), state_of(wanted, b))
            assert all(t.is_contiguous() for t in optimizer.state[a].values())
            if layout in (every_second, corner) and a.dim():
                memory = torch.as_strided(a.detach(), (a.untyped_storage().nbytes() // 4,), (1,), 0)
                assert int((memory == 77.0).sum()) == memory.numel() - a.numel()


@every_optimizer
def test_every_shape_moves_and_resumes(name: str) -> None:
    for shape in (
        *((), (1,), (5,), (1, 9), (9, 1), (4, 4), (3, 4, 5), (4, 3, 3, 2), (2, 3, 2, 3, 2)),
        *((0, 5), (0,)),
    ):
        named = make_params({"p": shape, "beside": (3, 7)})
        optimizer = build(name, named, [{"params": named, "max_grad_norm": 1.0}])
        before = values(named)
        train(optimizer, named, 0, 2)
        moved = {fqn: bool((p != before[fqn]).all()) for fqn, p in named}
        assert moved == {"p": True, "beside": True}, shape
        assert all(bool(p.isfinite().all()) for _, p in named), shape
        if not named[0][1].numel():
            assert named[0][1] not in optimizer.state
        fresh = build(name, [(fqn, nn.Parameter(p.detach().clone())) for fqn, p in named])
        fresh.load_state_dict(optimizer.state_dict())
        assert same(everything(fresh), everything(optimizer)), shape


# ------------------------------------------------------------------------------------ torch.compile


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(11, 4, generator=generator))
        self.wide = nn.Parameter(torch.randn(4, 7, generator=generator))
        self.bias = nn.Parameter(torch.zeros(7))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.embedding[tokens] @ self.wide + self.bias).square().mean()


@pytest.fixture(scope="module")
def compiled() -> Any:
    """A model whose compiled code serves all tests: they set its parameters."""
    model = Regression()
    return model, torch.compile(model, backend="aot_eager")


@every_optimizer
def test_a_compiled_model_takes_the_same_steps(name: str, compiled: Any) -> None:
    ends = []
    for call in compiled:
        model = compiled[0]
        model.load_state_dict(Regression().state_dict())
        optimizer = build(name, list(model.named_parameters()))
        for step in range(3):
            loss = call((torch.arange(6) * (step + 2)) % 11)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss)
        ends.append(everything(optimizer))
    assert same(*ends)
    assert not torch.equal(ends[0]["0.0"], Regression().embedding)


# -------------------------------------------------------------------------------------------- views


@every_optimizer
def test_the_report_lists_every_parameter_and_its_bytes(name: str) -> None:
    named = [*make_params(EVERY), ("frozen", nn.Parameter(torch.ones(3), requires_grad=False))]
    optimizer = build(name, named)
    report = optimizer.report()
    assert [row["fqn"] for row in report] == [*EVERY, "frozen"]
    for row, (_, param) in zip(report, named, strict=True):
        state = optimizer.state.get(param, {}).values()
        assert row["state_bytes"] == sum(t.numel() * t.element_size() for t in state)
        assert (row["rule"] == "frozen") == (not param.requires_grad)
    assert OPTIMIZERS[name].face.__name__ in str(report)


@every_optimizer
def test_stats_update_ratio_and_clip_rate(name: str) -> None:
    named = make_params(EVERY, torch.float64)
    group = {"params": named, "max_grad_norm": 0.05}
    optimizer = build(name, named, [group], clip="per_tensor")
    clipped = dict.fromkeys(EVERY, 0)
    for step in range(4):
        before = values(named)
        set_gradients(named, step)
        for fqn, param in named:
            clipped[fqn] += float(param.grad.norm()) + 1e-6 > 0.05
        optimizer.step(loss_of(step))
        stats = optimizer.stats()
        assert list(stats) == list(EVERY)
        for fqn, param in named:
            wanted = (param.detach() - before[fqn]).norm() / before[fqn].norm()
            torch.testing.assert_close(stats[fqn]["update_ratio"], wanted, rtol=1e-9, atol=0)
            assert stats[fqn]["update_ratio"].shape == stats[fqn]["clip_rate"].shape == ()
            assert float(stats[fqn]["clip_rate"]) == clipped[fqn] / (step + 1)
        norm = torch.cat([p.grad.flatten() for _, p in named]).norm()  # of the raw gradients
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-12, atol=0)
    assert 0 < sum(clipped.values()) < 4 * len(EVERY)

"""ZeroOptimizer on real gloo processes equals one process.

Background: every rank holds an arbitrary interval of each tensor, so row and column factors,
feature norms, the clip norm and the decision whether to step must come out of two packed
all-reduces. Gradients differ by rank and are integers over a power of two, so that their sum is
exact in any order and only the arithmetic of the step is compared.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import pylo_dist
from pylo_dist.core import trace
from pylo_dist.core.pieces import bound_shard
from pylo_dist.testing import largest_changes, layout_error
from support.golden import velo_weights
from support.optimizer_cases import snapshot
from support.optimizers import VARIANTS, OptimizerCase, Roles, cases, small_fc
from support.ranks import run_ranks

STEPS = 20
VOCABULARY = 50257


class Model(nn.Module):
    """Shapes that break sharded optimizers: uneven vocabulary, tied, [1, N], 0-d, dims below the
    ranks, empty, frozen.
    """

    def __init__(self, seed: int, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def tensor(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.02 * torch.randn(shape, generator=generator))

        self.embedding = tensor(vocabulary, 4)
        self.head = self.embedding  # tied
        self.row = tensor(1, 37)
        self.scalar = nn.Parameter(torch.randn((), generator=generator))
        self.tiny = tensor(2, 3)
        self.square = tensor(24, 24)
        self.wide = tensor(12, 40)
        self.conv = tensor(4, 3, 3, 3)
        self.bias = tensor(41)
        self.one = tensor(1)
        self.empty = tensor(0, 5)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.unused = tensor(6, 5)  # never has a gradient
        self.sometimes = tensor(7, 5)  # has one on rank 0 only
        self.transposed = nn.Parameter(0.02 * torch.randn((9, 14), generator=generator).t())


def gradient(fqn: str, shape: torch.Size, step: int, rank: int) -> Tensor | None:
    if fqn == "unused" or (fqn == "sometimes" and rank > 0):
        return None
    generator = torch.Generator().manual_seed(
        hash((len(fqn), sum(map(ord, fqn)), step, rank)) % 2**31
    )
    return torch.randint(-64, 65, shape, generator=generator) / 1024.0


def loss_of(step: int, rank: int) -> float:
    return 3.0 - 0.0625 * step + 0.125 * rank


def mean_gradient(fqn: str, shape: torch.Size, step: int, world: int) -> Tensor | None:
    parts = [gradient(fqn, shape, step, rank) for rank in range(world)]
    present = [p for p in parts if p is not None]
    return sum(present, torch.zeros(shape)).div_(world) if present else None


def unsharded(
    world: int, optimizer_class: type[torch.optim.Optimizer], **kwargs: Any
) -> tuple[list[dict[str, Tensor]], torch.optim.Optimizer, Model]:
    """The same steps in one process on the mean gradients: parameters after each, the optimizer,
    the model.
    """
    model = Model(0)
    optimizer = optimizer_class(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad], **kwargs
    )
    history = [snapshot(model)]
    for step in range(STEPS):
        for fqn, param in model.named_parameters():
            param.grad = (
                mean_gradient(fqn, param.shape, step, world) if param.requires_grad else None
            )
        if isinstance(optimizer, pylo_dist.LearnedOptimizer):
            optimizer.set_loss(sum(loss_of(step, rank) for rank in range(world)) / world)
        optimizer.step()
        history.append(snapshot(model))
    return history, optimizer, model


def set_gradients(model: nn.Module, step: int, rank: int) -> None:
    for fqn, param in model.named_parameters():
        param.grad = gradient(fqn, param.shape, step, rank) if param.requires_grad else None


RUN = ("loss_", "lstm_")  # entries of a group that belong to the run
ROLES = Roles(widths={"square": 4.0, "embedding": 2.0}, embedding="^embedding")


def settings(world: int) -> dict[str, OptimizerCase]:
    """What runs on this many ranks: all on 3, where nothing divides evenly, some on 1 and 4.

    On 2 ranks tests/contracts/test_real_ranks.py runs all, through a real backward.
    """
    names = {
        1: ("AdafacLO", "VeLO_clipped"),
        2: (),
        # the clipped ones do all that the plain ones do; other halved ones run on 2 and 4 ranks
        3: [
            name
            for name in VARIANTS
            if name not in ("VeLO", "Celo", "Tide", "AdafacLO_halved", "CELO2_halved")
        ],
        4: ("AdafacLO", "VeLO_clipped", "CELO2"),
    }
    return cases(ROLES, names[world])


class Calls:
    """Counts what comm sends, by kind; an observer of `trace`."""

    def __init__(self) -> None:
        self.counts = {"all_reduce": 0, "reduce_scatter": 0, "all_gather": 0}

    def begin(self, name: str, buffer: Tensor | None) -> None:
        kind = name.removeprefix("collective: ")
        if kind in self.counts:
            self.counts[kind] += 1

    def end(self, name: str) -> None:
        pass


def state_of(optimizer: pylo_dist.ZeroOptimizer) -> dict[str, Any]:
    """This rank's pieces: fqn -> (start, flattened sharded state, replicated state)."""
    pieces = {}
    for param, state in optimizer.state.items():
        shard = bound_shard(param).shard
        fields = optimizer.inner.state_fields(param)
        sharded = {
            n: fields[n].flat(t).clone() for n, t in state.items() if fields[n].replicated is None
        }
        pieces[shard.fqn] = (
            shard.start,
            sharded,
            {n: t.clone() for n, t in state.items() if fields[n].replicated is not None},
        )
    return pieces


def learned_ranks(rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, case in settings(world).items():
        # different on every rank: construction must bring rank 0's everywhere
        model = Model(seed=rank)
        optimizer = pylo_dist.ZeroOptimizer(model, case.face, bucket_cap_mb=0.002, **case.arguments)
        calls = Calls()
        with trace.observe(calls):
            for step in range(STEPS):
                set_gradients(model, step, rank)
                optimizer.step(torch.tensor(loss_of(step, rank)))
        results[name] = {
            "params": snapshot(model),
            "state": state_of(optimizer),
            "totals": optimizer.report().totals,
            "report": str(optimizer.report()),
            "calls": calls.counts,
            "buckets": len(optimizer.buckets),
            "stats": {fqn: float(row["update_ratio"]) for fqn, row in optimizer.stats().items()},
            "grad_norm": float(optimizer.grad_norm),
            "run": {
                k: v.clone() for k, v in optimizer.param_groups[0].items() if k.startswith(RUN)
            },
        }
    results["nonfinite"] = nonfinite_ranks(rank)
    results["failure"] = failure_ranks(rank, world)
    results["callbacks"] = {
        (face.__name__, case): raising_callback(rank, world, case, face, **settings)
        for face, settings in {
            pylo_dist.AdafacLO: {"weights": small_fc()},
            torch.optim.SGD: {},
        }.items()
        for case in CALLBACKS
    }
    results["idle"] = idle_ranks(rank)
    results["adamw"] = adamw_ranks(rank)
    results["disagree"] = disagreement(rank)
    return results


def nonfinite_ranks(rank: int) -> dict[str, Any]:
    """A NaN in one element on the last rank only: every rank must decide alike."""
    outcome: dict[str, Any] = {}
    for mode in ("error", "skip"):
        model = Model(0, vocabulary=53)
        optimizer = pylo_dist.ZeroOptimizer(
            model, pylo_dist.AdafacLO, weights=small_fc(), nonfinite=mode
        )
        set_gradients(model, 0, rank)
        optimizer.step()
        before, state = snapshot(model), state_of(optimizer)
        set_gradients(model, 1, rank)
        if rank == dist.get_world_size() - 1:
            model.square.grad[3, 5] = float("nan")
        try:
            optimizer.step()
            outcome[mode] = "passed"
        except pylo_dist.NonFiniteGradientError as error:
            outcome[mode] = str(error)
        after, state_after = snapshot(model), state_of(optimizer)
        same = all(torch.equal(before[f], after[f]) for f in before)
        for fqn, (_, sharded, replicated) in state.items():
            now = {**state_after[fqn][1], **state_after[fqn][2]}
            same &= all(torch.equal(t, now[n]) for n, t in {**sharded, **replicated}.items())
        outcome[f"{mode}_unchanged"] = same
        outcome[f"{mode}_step"] = int(optimizer.param_groups[0]["step"])
        set_gradients(model, 2, rank)
        optimizer.step()
        outcome[f"{mode}_goes_on"] = not torch.equal(snapshot(model)["square"], after["square"])
    return outcome


def failure_ranks(rank: int, world: int) -> dict[str, Any]:
    """The last rank alone cannot take a step: all must say so, change nothing, and be able to go on
    together.
    """
    outcome: dict[str, Any] = {}
    model = Model(0, vocabulary=53)
    optimizer = pylo_dist.ZeroOptimizer(
        model, pylo_dist.VeLO, num_steps=100, weights=velo_weights("small")
    )
    for case in ("good", "sparse", "no loss", "loss of two", "good again"):
        set_gradients(model, len(outcome), rank)
        before, state = snapshot(model), str(state_of(optimizer))
        loss: torch.Tensor | None = torch.tensor(2.0)
        if rank == world - 1:
            if case == "sparse":
                model.square.grad = model.square.grad.to_sparse()
            loss = {"no loss": None, "loss of two": torch.ones(2)}.get(case, loss)
        try:
            optimizer.step(loss)
            outcome[case] = "step"
        except (ValueError, pylo_dist.PeerError) as error:
            outcome[case] = f"{type(error).__name__}: {error}"
        same = all(torch.equal(before[f], p) for f, p in snapshot(model).items()) and state == str(
            state_of(optimizer)
        )
        outcome[f"{case} changed"] = not same
        assert all(
            member.piece.grad is None for bucket in optimizer.buckets for member in bucket.members
        )
    outcome["steps"] = int(optimizer.param_groups[0]["step"])
    return outcome


CALLBACKS = ("before backward", "in backward", "after backward", "hook")


def raising_callback(
    rank: int, world: int, case: str, face: Any, **arguments: Any
) -> tuple[list[str], bool, Tensor]:
    """What three steps say; in the second the user's code fails on the last rank. Whether that one
    changed anything, and a weight in the end.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    learned = face is pylo_dist.AdafacLO
    optimizer = pylo_dist.ZeroOptimizer(
        model, face, stage=1 if learned else 2, overlap=learned, bucket_cap_mb=1e-5, **arguments
    )
    said, same = [], False
    for step in range(3):
        failing = case if (step, rank) == (1, world - 1) else ""

        def fail(here: str, failing: str = failing) -> None:
            if here == failing:
                raise OSError(here)

        def closure(fail: Any = fail) -> Tensor:
            optimizer.zero_grad()
            fail("before backward")
            hook = model[0].bias.register_hook(lambda _: fail("in backward"))
            try:
                model(torch.full((1, 4), rank + 1.0)).sum().backward()
            finally:
                hook.remove()
            fail("after backward")
            return torch.tensor(1.0)

        hook = optimizer.register_step_pre_hook(lambda *_, fail=fail: fail("hook"))
        before = snapshot(model)
        try:
            optimizer.step(closure)
            said.append("stepped")
        except (OSError, pylo_dist.PeerError) as error:
            said.append(
                type(error).__name__ if isinstance(error, pylo_dist.PeerError) else str(error)
            )
            same = all(torch.equal(before[fqn], p) for fqn, p in snapshot(model).items())
        hook.remove()
    return said, same, snapshot(model)["0.weight"]


def idle_ranks(rank: int) -> list[int]:
    """How often each step says that there is no gradient: that of one rank is enough."""
    model, said = Model(0, vocabulary=53), []
    optimizer = pylo_dist.ZeroOptimizer(model, pylo_dist.AdafacLO, weights=small_fc())
    for step, holders in enumerate((range(9), range(1), (), ())):
        optimizer.zero_grad()
        if rank in holders:
            set_gradients(model, step, rank)
        with warnings.catch_warnings(record=True) as records:
            warnings.simplefilter("always", pylo_dist.NoGradientWarning)
            optimizer.step()
        said.append(sum(record.category is pylo_dist.NoGradientWarning for record in records))
    return said


def adamw_ranks(rank: int) -> dict[str, Tensor]:
    model = Model(0)
    optimizer = pylo_dist.ZeroOptimizer(model, torch.optim.AdamW, lr=1e-2, foreach=True)
    for step in range(STEPS):
        set_gradients(model, step, rank)
        optimizer.step()
    return snapshot(model)


def disagreement(rank: int) -> str:
    params = nn.Linear(3, 4).parameters()
    with pytest.raises((TypeError, pylo_dist.PeerError)) as unordered:
        pylo_dist.ZeroOptimizer(set(params) if rank == 0 else list(params), torch.optim.AdamW)
    assert (unordered.type is TypeError) == (rank == 0)
    model, different_model = nn.Linear(3, 4 if rank == 0 else 5), "no error"
    try:
        pylo_dist.ZeroOptimizer(model, pylo_dist.AdafacLO, weights=small_fc())
    except ValueError as error:
        different_model = str(error)
    lopt_weights = small_fc()
    lopt_weights["network.output.bias"] += rank
    try:
        pylo_dist.ZeroOptimizer(nn.Linear(3, 4), pylo_dist.AdafacLO, weights=lopt_weights)
    except ValueError as error:
        return f"{different_model} | {error}"
    return f"{different_model} | no error"


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_equal_one_process(world: int, figures: list[str]) -> None:
    ranks = run_ranks(world, learned_ranks)
    for name, case in settings(world).items():
        worst_state = 0.0
        history, reference, model = unsharded(world, case.face, **case.arguments)
        change = largest_changes(history)
        results = [rank[name] for rank in ranks]
        for result in results:
            for fqn, tensor in result["params"].items():
                assert torch.equal(tensor, results[0]["params"][fqn]), (name, fqn)
        share = case.share(torch.float32)
        errors = layout_error(results[0]["params"], history[-1], change, share)
        assert max(errors.values()) <= 1.0, (name, errors)
        assert torch.equal(results[0]["params"]["unused"], history[0]["unused"])
        assert torch.equal(results[0]["params"]["frozen"], torch.ones(3))
        assert not torch.equal(results[0]["params"]["sometimes"], history[0]["sometimes"])
        for fqn, param in model.named_parameters():
            if not param.requires_grad or not param.numel():
                continue
            fields = reference.state_fields(param)
            for field_name, wanted in reference.state[param].items():
                flat = fields[field_name].flat(wanted)
                if fields[field_name].replicated is None:
                    got = torch.empty_like(flat)
                    covered = 0
                    for result in results:
                        start, sharded, _ = result["state"][fqn]
                        piece = sharded[field_name]
                        got[..., start : start + piece.shape[-1]] = piece
                        covered += piece.shape[-1]
                    assert covered == flat.shape[-1]
                else:
                    copies = [result["state"][fqn][2][field_name] for result in results]
                    if fields[field_name].beside_elements:  # and nothing elsewhere
                        held = [result["state"][fqn][1]["rms"].numel() > 0 for result in results]
                        assert held == [copy.numel() > 0 for copy in copies], (fqn, field_name)
                        copies = [copy for copy in copies if copy.numel()]
                    assert all(torch.equal(copy, copies[0]) for copy in copies), (fqn, field_name)
                    got = fields[field_name].flat(copies[0])
                error = layout_error({fqn: got}, {fqn: flat}, {fqn: flat.abs().max()})[fqn]
                assert error <= 1.0, (name, fqn, field_name, error)
                worst_state = max(worst_state, error)
        for fqn, ratio in results[0]["stats"].items():
            assert ratio == pytest.approx(results[-1]["stats"][fqn], rel=1e-12, nan_ok=True), fqn
        for key, wanted in (
            (k, v) for k, v in reference.param_groups[0].items() if k.startswith(RUN)
        ):
            for result in results:  # float64 means of the averaged loss
                torch.testing.assert_close(result["run"][key], wanted, rtol=1e-12, atol=0)
        assert case.needs_loss == bool(results[0]["run"])
        wanted_norm = float(reference.grad_norm)
        assert results[0]["grad_norm"] == pytest.approx(wanted_norm, rel=1e-9)
        # one more small sum for a slender matrix cut into whole rows
        per_step = 3 if ", gram" in results[0]["report"] else case.reductions
        shared = per_step * STEPS if world > 1 else 0
        buckets = results[0]["buckets"]
        assert buckets > 2
        if world > 1:
            assert results[0]["calls"] == {
                "all_reduce": shared,
                "reduce_scatter": buckets * STEPS,
                "all_gather": buckets * STEPS,
            }
        figures.append(
            f"real ranks | {name} on {world} | {STEPS} steps: {max(errors.values()):.2g} of the "
            f"layout tolerance, state {worst_state:.2g}; "
            f"{results[0]['calls']['all_reduce'] / STEPS:g} small all-reduces per step"
        )
    for number, rank in enumerate(ranks):
        outcome = rank["nonfinite"]
        assert "'square'" in outcome["error"]
        assert outcome["skip"] == "passed"
        for mode in ("error", "skip"):
            assert outcome[f"{mode}_unchanged"]
            assert outcome[f"{mode}_goes_on"]
            assert outcome[f"{mode}_step"] == 1
        for (face, case), (said, same, weight) in rank["callbacks"].items():
            assert said == ["stepped", case if number == world - 1 else "PeerError", "stepped"]
            assert same
            assert torch.equal(weight, ranks[0]["callbacks"][face, case][2])
        failure = rank["failure"]
        assert failure["steps"] == 2
        for case in ("good", "good again"):
            assert failure[case] == "step"
            assert failure[f"{case} changed"]
        for case in ("sparse", "no loss", "loss of two"):
            assert not failure[f"{case} changed"], case
        own = rank is ranks[-1]
        assert (
            "ValueError: 'square' has a sparse gradient" if own else "PeerError: another rank"
        ) in failure["sparse"]
        assert "some rank gave none" in failure["no loss"]
        assert (
            "ValueError: the loss has shape (2,)" if own else "PeerError: another rank"
        ) in failure["loss of two"]
    assert [r["idle"] for r in ranks] == [[0, 0, 1, 0]] * world
    if world > 1:
        for r in ranks:
            different_model, different_weights = r["disagree"].split(" | ")
            assert "disagree on parameter" in different_model
            assert "'weight', [4, 3]" in different_model
            assert "disagree on setting" in different_weights
            assert "sha256" in different_weights
    # AdamW is elementwise: on integer gradients the sharded step is the same arithmetic; a
    # parameter that never has a gradient gets zeros, so only weight decay reaches it
    history, _, _ = unsharded(world, torch.optim.AdamW, lr=1e-2, foreach=True)
    change = largest_changes(history)
    names = [f for f in history[0] if f not in ("unused", "frozen", "empty")]
    errors = layout_error(ranks[0]["adamw"], {f: history[-1][f] for f in names}, change)
    assert max(errors.values()) <= 1.0, errors


def gpt2_report(rank: int, world: int) -> dict[str, Any]:
    """GPT-2's own shapes, small: the fused projections and the vocabulary that no number of ranks
    divides.
    """
    with torch.device("cpu"):
        shapes = {
            "wte": (50257, 16),
            "wpe": (64, 16),
            "attn": (48, 16),
            "attn.bias": (48,),
            "proj": (16, 16),
            "fc": (64, 16),
            "ln": (16,),
        }
    params = [(fqn, nn.Parameter(torch.zeros(shape))) for fqn, shape in shapes.items()]
    optimizer = pylo_dist.ZeroOptimizer(params, pylo_dist.AdafacLO, weights=small_fc())
    return {"totals": optimizer.report().totals, "text": str(optimizer.report())}


@pytest.mark.parametrize("world", [3])
def test_each_rank_holds_its_share_of_the_state(world: int) -> None:
    ranks = run_ranks(world, gpt2_report)
    total = 16 * sum(r["totals"]["numel"] for r in ranks)  # 3 momenta and rms, 4 bytes each
    one_dim = 12 * 64  # the diag accumulator of the 1-D tensors, instead of row and column
    assert sum(r["totals"]["sharded_state_bytes"] for r in ranks) == total + one_dim
    for r in ranks:
        assert r["totals"]["sharded_state_bytes"] == pytest.approx(
            (total + one_dim) / world, rel=0.01
        )
        assert 1.0 <= r["totals"]["work_max_over_mean"] <= 1.01
        assert "work_max_over_mean" in r["text"]
        assert "ZeRO-1, rank" in r["text"]


def test_one_process_without_torch_distributed() -> None:
    model, plain = Model(0, vocabulary=53), Model(0, vocabulary=53)
    sharded = pylo_dist.ZeroOptimizer(model, pylo_dist.AdafacLO, weights=small_fc())
    whole = pylo_dist.AdafacLO(
        [(n, p) for n, p in plain.named_parameters() if p.requires_grad], weights=small_fc()
    )
    for step in range(3):
        set_gradients(model, step, 0)
        set_gradients(plain, step, 0)
        sharded.step()
        whole.step()
    for (fqn, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(a, b), fqn


def test_safetensors_hold_every_parameter(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_model

    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3).to(torch.bfloat16))
    pylo_dist.ZeroOptimizer(model, pylo_dist.AdafacLO, weights=small_fc())
    save_model(model, str(tmp_path / "model.safetensors"))
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    for fqn, param in model.named_parameters():
        assert torch.equal(saved[fqn], param)
        # by which savers tell whether tensors are one: neighbours in a bucket are not
        assert param.untyped_storage().nbytes() == param.numel() * param.element_size()


def test_ranks_that_have_not_met_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each would train a model of its own, without a word."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"one of 2 .* torch\.distributed\.init_process_group\(\)"):
        pylo_dist.ZeroOptimizer(model, pylo_dist.AdafacLO, weights=small_fc())
    pylo_dist.ZeroOptimizer(model, pylo_dist.AdafacLO, process_group=False, weights=small_fc())
    monkeypatch.setenv("WORLD_SIZE", "1")
    pylo_dist.ZeroOptimizer(nn.Linear(3, 4), pylo_dist.AdafacLO, weights=small_fc())


def test_refusals_name_the_remedy() -> None:
    model = nn.Linear(3, 4)

    def build(*args: Any, **kwargs: Any) -> pylo_dist.ZeroOptimizer:
        return pylo_dist.ZeroOptimizer(
            model, *(args or (pylo_dist.AdafacLO,)), **{"weights": small_fc(), **kwargs}
        )

    with pytest.raises(ValueError, match="stage=3"):
        build(stage=3)
    with pytest.raises(ValueError, match="silently wrong on shards"):
        pylo_dist.ZeroOptimizer(model, torch.optim.Adafactor)
    with pytest.raises(ValueError, match="bucket_cap_mb"):
        build(bucket_cap_mb=0)
    with pytest.raises(ValueError, match="reduce_dtype"):
        build(reduce_dtype=torch.int32)
    optimizer = build()
    model.double()
    model(torch.zeros(1, 3, dtype=torch.float64)).sum().backward()
    with pytest.raises(
        ValueError, match=r"'(weight|bias)' was replaced after ZeroOptimizer was built"
    ):
        optimizer.step()


def test_empty_parameters_fill_no_bucket() -> None:
    params = [("empty", nn.Parameter(torch.zeros(0, 5))), ("w", nn.Parameter(torch.randn(30, 30)))]
    # of a dtype of its own, and so in a bucket that nobody has a part of
    params.append(("alone", nn.Parameter(torch.zeros(0, 5, dtype=torch.bfloat16))))
    optimizer = pylo_dist.ZeroOptimizer(
        params, pylo_dist.AdafacLO, weights=small_fc(), bucket_cap_mb=0.001
    )
    for _, p in params:
        p.grad = torch.ones_like(p)
    before = params[1][1].detach().clone()
    optimizer.step()
    assert not torch.equal(before, params[1][1])


def test_what_is_frozen_is_not_forgotten() -> None:
    model = Model(0, vocabulary=53)
    optimizer = pylo_dist.ZeroOptimizer(model, pylo_dist.AdafacLO, weights=small_fc())
    model.frozen.requires_grad_(True)
    model.frozen.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"'frozen' was frozen.*add_param_group"):
        optimizer.step()
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.add_param_group({"params": [("frozen", model.frozen)], "lr": -1.0})
    optimizer.add_param_group({"params": [("frozen", model.frozen)]})
    optimizer.step()
    assert not torch.equal(model.frozen, torch.ones(3))


def test_hooks_extend_and_copies() -> None:
    model = Model(0, vocabulary=53)
    optimizer = pylo_dist.ZeroOptimizer(
        model, pylo_dist.VeLO, num_steps=5, weights=velo_weights("small")
    )
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("step"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    set_gradients(model, 0, 0)
    optimizer.step(torch.tensor(1.0))
    state = optimizer.state_dict()
    assert state.pop("note") == 1
    optimizer.load_state_dict(state)
    assert seen == ["step", "save", "load", "loaded"]
    optimizer.extend(50)
    assert optimizer.param_groups[0]["num_steps"] == 50
    import copy

    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(optimizer)


def test_scheduler_groups_and_resume_in_place() -> None:
    model = Model(0, vocabulary=53)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": named[:4], "lr": 0.5}, {"params": named[4:8], "weight_decay": 0.1}]
    optimizer = pylo_dist.ZeroOptimizer(groups, pylo_dist.AdafacLO, weights=small_fc())
    optimizer.add_param_group({"params": named[8:], "lr": 2.0})
    with pytest.raises(ValueError, match="already in a parameter group"):
        optimizer.add_param_group({"params": [named[0]]})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 1.0, 2.0]

    def advance(first: int, last: int) -> None:
        for step in range(first, last):
            set_gradients(model, step, 0)
            optimizer.step()
            scheduler.step()

    advance(0, 2)
    saved, params, lr = optimizer.state_dict(), snapshot(model), scheduler.state_dict()
    saved = {
        **saved,
        "state": {k: {n: t.clone() for n, t in v.items()} for k, v in saved["state"].items()},
    }
    import copy

    saved = copy.deepcopy(saved)
    advance(2, 4)
    wanted = snapshot(model)
    with torch.no_grad():
        for fqn, p in model.named_parameters():
            p.copy_(params[fqn])
    optimizer.load_state_dict(saved)
    scheduler.load_state_dict(lr)
    for group, factor in zip(optimizer.param_groups, (0.5, 1.0, 2.0), strict=True):
        group["lr"] = factor * 0.25
    advance(2, 4)
    assert all(torch.equal(wanted[f], p) for f, p in snapshot(model).items())
    broken = {
        **saved,
        "param_groups": [{**group, "state_rule": "velo"} for group in saved["param_groups"]],
    }
    with pytest.raises(ValueError, match="state_rule 'velo', this optimizer 'small_fc'"):
        optimizer.load_state_dict(broken)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())

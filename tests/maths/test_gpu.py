"""The CUDA passes on a GPU: every rule, precision and dtype against float64 on the CPU, graphs,
streams, bits; and gradients that are averaged beside backward.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import pylo_dist
from pylo_dist.adapters.zero.aside import Aside
from pylo_dist.core.pieces import bind_shard
from pylo_dist.core.shards import TensorShard
from pylo_dist.maths import compiled
from pylo_dist.testing import largest_changes, layout_error, run_virtual
from support import adamw_checks, cuda_checks
from support import copies as copy_checks
from support.kernels import in_float64, random_cuts, random_problem, relative, run
from support.optimizers import Roles, cases
from support.virtual import COMPILED

REASON = compiled.library("cuda")
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"CUDA passes: {REASON}")


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("name", COMPILED)
def test_errors_are_those_of_the_pytorch_path(
    name: str, precision: str, figures: list[str]
) -> None:
    worst = [0.0, 0.0]
    for seed in range(4):
        own, error = cuda_checks.check_random(name, precision, "cuda", seed, 1 + seed % 3)
        worst = [max(worst[0], own), max(worst[1], error)]
    figures.append(
        f"CUDA passes | {name} | {precision}: largest error {worst[1]:.1e}, PyTorch {worst[0]:.1e}"
    )


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("name", COMPILED)
def test_two_runs_give_the_same_bits(name: str, precision: str) -> None:
    cuda_checks.check_two_runs(name, precision, "cuda")


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_nan_and_extremes(precision: str) -> None:
    torch.manual_seed(0)
    cuda_checks.check_nan(precision, "cuda")
    cuda_checks.check_extremes(precision, "cuda")


@pytest.mark.parametrize("name", ["CeloAdam", "CeloAdam_halved"])
def test_adamw(name: str) -> None:
    """Nothing is fused: a CPU's means to the bit, its parameters but for the LSTM's last bits."""
    problem = random_problem(random.Random(name), steps=2)
    ours = run(name, cuda_checks.on(problem, "cuda"), lr=50.0)
    wanted = run(name, problem, lr=50.0)
    for fqn in adamw_checks.moved_by_adamw(wanted):
        torch.testing.assert_close(ours.params[fqn].cpu(), wanted.params[fqn], rtol=1e-6, atol=1e-7)
        for key, value in wanted.state[fqn].items():
            assert torch.equal(ours.state[fqn][key].cpu(), value), (fqn, key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_parameters_of_16_bits(dtype: torch.dtype, precision: str) -> None:
    cuda_checks.check_dtype(precision, "cuda", dtype)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("name", cuda_checks.HALVED)
def test_halved_state_has_the_bits_of_a_cpu(name: str, precision: str, figures: list[str]) -> None:
    """What is stored in bfloat16, on any cut, beside the PyTorch path on a CPU."""
    compared = 0
    for seed in range(4):
        rng = random.Random(f"{name} {seed}")
        problem = random_problem(rng) if seed % 2 else cuda_checks.matrix_problem(rng, "cuda")
        cuts = random_cuts(rng, problem[0], (1, 2, 3, 7)[seed])
        compared += cuda_checks.check_halved(name, precision, problem, "cuda", cuts)
    figures.append(f"CUDA passes | {name} | {precision}: {compared} means bit-equal")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["AdafacLO_halved", "VeLO_halved"])
def test_halved_state_of_parameters_of_16_bits(name: str, dtype: torch.dtype) -> None:
    cuda_checks.check_dtype("high", "cuda", dtype, name)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_halved_state_beyond_the_largest_numbers(precision: str) -> None:
    cuda_checks.check_extreme_means(precision, "cuda")


@pytest.mark.parametrize("shape", [(1 << 33,), (66_000, 66_000)])
def test_elements_beyond_32_bits_are_rounded_alike(shape: tuple[int, ...]) -> None:
    cuda_checks.check_beyond_32_bits(shape, "cuda")


@pytest.mark.parametrize("name", ["AdafacLO", "VeLO", "CELO2_base"])
def test_a_large_matrix(name: str) -> None:
    """Many jobs for every block, sums in many parts, a length that is no multiple of anything."""
    generator = torch.Generator().manual_seed(11)
    params = {
        "t0": 0.02 * torch.randn(1001, 1537, generator=generator),
        "t1": 0.02 * torch.randn(4099, generator=generator),
    }
    grads = [{fqn: torch.randn(p.shape, generator=generator) for fqn, p in params.items()}]
    problem = (params, grads, [1.0])
    truth, oracle = run(name, in_float64(problem)), run(name, problem, kernels=False)
    ours = run(name, cuda_checks.on(problem, "cuda"), 2, precision="high")
    for fqn, p in params.items():
        moved = truth.params[fqn] - p.double()
        own, error = (
            relative(r.params[fqn].cpu(), truth.params[fqn], moved) for r in (oracle, ours)
        )
        floor = cuda_checks.FLOOR + float(cuda_checks.EPS * p.double().norm() / moved.norm())
        assert error <= cuda_checks.LIMITS["high"] * own + floor, (fqn, own, error)


def trained(
    precision: str, seed: int, steps: int
) -> tuple[list[torch.nn.Parameter], pylo_dist.LearnedOptimizer]:
    """An optimizer that has taken `steps` steps on fixed gradients, which stay in place."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(96, 200), (200, 96), (64,), (), (8, 4, 3, 3)]
    params = [
        torch.nn.Parameter((0.02 * torch.randn(shape, generator=generator)).cuda())
        for shape in shapes
    ]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).cuda()
    optimizer = pylo_dist.AdafacLO(params, weights="demo", precision=precision)
    for _ in range(steps):
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_passes_replay_in_a_graph(precision: str) -> None:
    """The three passes captured in a CUDA graph, with tables of their own, do what they do outside
    of one.
    """
    params, optimizer = trained(precision, 21, 1)
    rule, batch = optimizer._ready().work[0]
    cuda_checks.hold_gradients(batch, params)
    kernels = rule.kernels(batch)  # type: ignore[attr-defined]
    indices = list(range(len(batch.items)))
    limits = [rule.limits(item) for item in batch.items]  # type: ignore[attr-defined]
    updates = rule.updates(batch)  # type: ignore[attr-defined]
    a, b = rule.first_sum(batch), rule.second_sum(batch)  # type: ignore[attr-defined]

    def step() -> None:
        a.zero_()
        kernels.gradient_pass(batch, indices, limits, False)
        b.zero_()
        kernels.feature_pass(batch, indices)
        kernels.update_pass(batch, indices, updates, precision)

    def state() -> list[torch.Tensor]:
        return [*params, *(t for item in batch.items for t in item.state.values())]

    before = [t.detach().clone() for t in state()]
    step()
    step()
    want = [t.detach().clone() for t in state()]
    with torch.no_grad():
        for t, old in zip(state(), before, strict=True):
            t.copy_(old)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    assert all(torch.equal(t, old) for t, old in zip(state(), before, strict=True)), (
        "capturing ran the passes"
    )
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(t, wanted) for t, wanted in zip(state(), want, strict=True))


def test_two_streams_do_not_meet() -> None:
    """Two optimizers on two streams, their steps interleaved without waiting, end like each
    alone.
    """
    alone = [[p.detach().clone() for p in trained("high", seed, 12)[0]] for seed in (31, 32)]
    runs = [trained("high", seed, 1) for seed in (31, 32)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(11):
        for stream, (_, optimizer) in zip(streams, runs, strict=True):
            with torch.cuda.stream(stream):
                optimizer.step()
    torch.cuda.synchronize()
    for (params, _), want in zip(runs, alone, strict=True):
        assert all(torch.equal(p, w) for p, w in zip(params, want, strict=True))


def test_a_step_neither_allocates_nor_waits() -> None:
    """The passes themselves: no memory beyond what the first step made, no synchronisation with the
    host.
    """
    params, optimizer = trained("high", 41, 2)
    rule, batch = optimizer._ready().work[0]
    cuda_checks.hold_gradients(batch, params)
    kernels, indices = rule.kernels(batch), list(range(len(batch.items)))  # type: ignore[attr-defined]
    limits, updates = [rule.limits(item) for item in batch.items], rule.updates(batch)  # type: ignore[attr-defined]
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.gradient_pass(batch, indices, limits, False)
        kernels.feature_pass(batch, indices)
        kernels.update_pass(batch, indices, updates, "high")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_launches_of_a_step() -> None:
    """Six kernels for the passes of a step, for five tensors as for fifty."""
    counts = []
    for copies in (1, 10):
        params = [torch.nn.Parameter(torch.randn(48, 64, device="cuda")) for _ in range(5 * copies)]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer = pylo_dist.AdafacLO(params, weights="demo")
        optimizer.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        counts.append(
            sum(event.count for event in profile.key_averages() if "pylo_dist" in event.key)
        )
    assert counts[0] == counts[1] <= 6, counts


ROLES = Roles(widths={"t0": 2.0}, embedding="^$")
BUILD = cases(ROLES, able="kernels") | cases(ROLES, cuda_checks.HALVED)
GRAPH_SHAPES = [(96, 200), (200, 96), (96, 200), (64,), (64,), (), (8, 4, 3, 3), (300, 20)]


class Run:
    """An optimizer of a rule on a GPU; gradients, loss and rate lie where a CUDA graph can find
    them again.
    """

    def __init__(self, name: str) -> None:
        generator = torch.Generator().manual_seed(71)
        self.params = [
            torch.nn.Parameter((0.02 * torch.randn(shape, generator=generator)).cuda())
            for shape in GRAPH_SHAPES
        ]
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.rate, self.loss = torch.tensor(0.5, device="cuda"), torch.tensor(1.0, device="cuda")
        named = [(f"t{i}", p) for i, p in enumerate(self.params)]
        self.optimizer = BUILD[name].build(named, lr=self.rate, weight_decay=0.1)

    def feed(self, step: int) -> None:
        """The numbers of a step, in place."""
        generator = torch.Generator().manual_seed(100 + step)
        for p in self.params:
            p.grad.copy_(torch.randn(p.shape, generator=generator))  # type: ignore[union-attr]
        self.rate.fill_(0.5**step)
        self.loss.fill_(2.0 / (step + 1))

    def state(self) -> list[torch.Tensor]:
        groups = [
            value
            for group in self.optimizer.param_groups
            for value in group.values()
            if isinstance(value, torch.Tensor)
        ]
        state = [t for p in self.params for t in self.optimizer.state[p].values()]
        return [t.detach().clone() for t in (*self.params, *state, *groups)]

    def capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.optimizer.step(self.loss)
        return graph


@pytest.mark.parametrize("rate", ["float", "tensor"])
@pytest.mark.parametrize("name", BUILD)
def test_a_whole_step_never_waits(name: str, rate: str) -> None:
    """torch fails on every synchronising call; the learning rate changes at every step, as a
    schedule has it.
    """
    run = Run(name)
    for step in range(4):
        run.feed(step)
        if rate == "float":
            run.optimizer.param_groups[0]["lr"] = 0.5**step
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")
        try:
            run.optimizer.step(run.loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert int(run.optimizer.param_groups[0]["step"]) == 4


@pytest.mark.parametrize("name", BUILD)
def test_a_whole_step_replays_in_a_graph(name: str) -> None:
    """Six replayed steps are six eager ones: gradients, loss, rate and step count are read anew.

    To 1e-5 of the largest change: cuBLAS may take other kernels inside a graph (Newton-Schulz:
    5e-5, see the layout tolerance).
    """
    eager, replayed = Run(name), Run(name)
    for one in (eager, replayed):
        for step in range(2):
            one.feed(step)
            one.optimizer.step(one.loss)
    before = replayed.state()
    graph = replayed.capture()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(replayed.state(), before, strict=True)), (
        "capturing took a step"
    )
    for step in range(2, 8):
        eager.feed(step)
        eager.optimizer.step(eager.loss)
        replayed.feed(step)
        graph.replay()
    share = 5e-5 if "CELO2" in name else 1e-5
    for got, wanted, old in zip(replayed.state(), eager.state(), before, strict=True):
        change = (wanted.double() - old.double()).abs().max()
        torch.testing.assert_close(
            got.double(), wanted.double(), rtol=4 * cuda_checks.EPS, atol=float(share * change)
        )
    assert int(replayed.optimizer.param_groups[0]["step"]) == 8
    assert replayed.optimizer.grad_norm.item() == pytest.approx(
        eager.optimizer.grad_norm.item(), rel=1e-6
    )


@pytest.mark.parametrize("then", ["state_dict", "step"])
def test_a_bad_replay_is_heard_of(then: str) -> None:
    """It changes nothing, good ones may follow, and the next call that asks names the parameter."""
    run = Run("AdafacLO")
    for step in range(2):
        run.feed(step)
        run.optimizer.step(run.loss)
    graph = run.capture()
    before = run.state()
    run.feed(2)
    run.params[3].grad[5] = float("nan")  # type: ignore[index]
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(run.state(), before, strict=True))
    run.feed(3)
    graph.replay()
    if then == "step":
        run.optimizer.step(run.loss)  # its flags carry those of the replays; the next one asks
    with pytest.raises(pylo_dist.NonFiniteGradientError, match="'t3' holds"):
        run.optimizer.state_dict() if then == "state_dict" else run.optimizer.step(run.loss)
    run.optimizer.state_dict()


def test_a_graph_that_outlived_its_state_writes_no_memory_of_others() -> None:
    run = Run("AdafacLO")
    for step in range(2):
        run.feed(step)
        run.optimizer.step(run.loss)
    graph = run.capture()
    with pytest.warns(UserWarning, match="capture it again"):
        run.optimizer.load_state_dict(run.optimizer.state_dict())
    sizes = [16, 256, 4096, 1 << 16, 1 << 20]  # so that memory given back is taken
    others = [torch.zeros(size, device="cuda") for size in sizes for _ in range(64)]
    run.feed(2)
    graph.replay()
    torch.cuda.synchronize()
    assert not any(bool(x.any()) for x in others)


def test_what_a_graph_cannot_hold_is_refused() -> None:
    run = Run("VeLO")
    with pytest.raises(ValueError, match="before the first one"):
        run.capture()
    run.feed(0)
    run.optimizer.step(run.loss)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(ValueError, match="give it as a tensor on cuda"), torch.cuda.graph(graph):
        run.optimizer.step(torch.tensor(1.0))


def test_operations_of_a_step_do_not_grow(figures: list[str]) -> None:
    """All kernels, copies and fills of a step, for 10 and for 150 tensors of two sizes;
    concatenation takes 128 at a time.
    """
    for name in BUILD:
        counts = []
        for tensors in (10, 150):
            params = [
                torch.nn.Parameter(torch.randn((48, 64) if i % 2 else (64,), device="cuda"))
                for i in range(tensors)
            ]
            optimizer = BUILD[name].build([(f"t{i}", p) for i, p in enumerate(params)])
            loss = torch.tensor(1.0, device="cuda")
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step(loss)
            optimizer.step(loss)
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA]
            ) as profile:
                optimizer.step(loss)
                torch.cuda.synchronize()
            counts.append(
                sum(
                    event.device_type == torch.autograd.DeviceType.CUDA
                    for event in profile.events()
                )
            )
        figures.append(
            f"CUDA | {name} | {counts[0]} operations on the device for 10 tensors, {counts[1]} for "
            "150"
        )
        assert counts[1] <= counts[0] + 24, (name, counts)


def test_random_cuts_and_ranks() -> None:
    rng = random.Random(51)
    for _ in range(20):
        cuda_checks.check_random(
            "AdafacLO", "high", "cuda", rng.randrange(1000), rng.choice([1, 2, 5])
        )


RANK_SHAPES = {"w": (70, 96), "embedding": (301, 64), "b": (65,), "c": (8, 4, 3, 3), "s": ()}


def rank_problem() -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(61)
    params = {
        fqn: 0.02 * torch.randn(shape, generator=generator) for fqn, shape in RANK_SHAPES.items()
    }
    return params, [
        {fqn: torch.randn(shape, generator=generator) for fqn, shape in RANK_SHAPES.items()}
        for _ in range(4)
    ]


def one_rank(rank: int, world: int, backend: str, folder: str) -> None:
    """A rank of a real process group on the one GPU: flat intervals of every tensor, at uneven
    places.
    """
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    try:
        params, grads = rank_problem()
        shards, pieces = {}, {}
        for fqn, p in params.items():
            points = [
                0,
                *(p.numel() * r // world + (p.numel() > world) for r in range(1, world)),
                p.numel(),
            ]
            shards[fqn] = TensorShard.interval(fqn, tuple(p.shape), points[rank], points[rank + 1])
            pieces[fqn] = torch.nn.Parameter(shards[fqn].take(p).cuda())
            bind_shard(pieces[fqn], shards[fqn], rank, dist.group.WORLD)
        optimizer = pylo_dist.AdafacLO(list(pieces.items()), weights="demo")
        for step in grads:
            for fqn, piece in pieces.items():
                piece.grad = shards[fqn].take(step[fqn]).cuda()
            optimizer.step()
        torch.save(
            {fqn: piece.detach().cpu() for fqn, piece in pieces.items()}, f"{folder}/{rank}.pt"
        )
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("backend", "world"), [("gloo", 2), ("gloo", 4), ("nccl", 1)])
def test_real_ranks_on_one_gpu(backend: str, world: int, tmp_path: Path) -> None:
    """The layout tolerance between real processes with real cuts and one process without."""
    params, grads = rank_problem()
    with compiled.use_kernels(True):
        whole = run_virtual(
            pylo_dist.AdafacLO,
            {fqn: p.cuda() for fqn, p in params.items()},
            1,
            [{fqn: g.cuda() for fqn, g in step.items()} for step in grads],
            weights="demo",
        )
    mp.spawn(one_rank, args=(world, backend, str(tmp_path)), nprocs=world, join=True)
    pieces = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    joined = {
        fqn: torch.cat([piece[fqn] for piece in pieces]).view(p.shape).cuda()
        for fqn, p in params.items()
    }
    history = [{fqn: p.cuda() for fqn, p in params.items()}, *whole.history]
    errors = layout_error(joined, whole.params, largest_changes(history))
    assert max(errors.values()) <= 1.0, errors


def test_copies_into_a_bucket_are_those_of_torch() -> None:
    copy_checks.check_pairs(torch.ops.pylo_dist.copy_pass, "cuda")
    copy_checks.check_many(torch.ops.pylo_dist.copy_pass, "cuda")


def test_a_row_of_more_than_2_to_the_31_elements_is_copied() -> None:
    numel = (1 << 31) + 100_003
    if torch.cuda.mem_get_info()[0] < 5 * numel:
        pytest.skip("10 GB are not free")
    source = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    source[[7, 1 << 31, numel - 1]] = torch.tensor([3.0, 5.0, -2.0]).to(source)
    target, ends = torch.ones_like(source), torch.zeros(2, 2, device="cuda")
    torch.ops.pylo_dist.copy_pass([target], [source], ends)
    assert torch.equal(target, source)
    assert ends[0].tolist() == [-2.0, 5.0]


DEEP, SLOW = 8, 20_000_000  # layers, and cycles: some 10 ms


class Deep(torch.nn.Module):
    """Layers of about 1 MB each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(512, 512) for _ in range(DEEP))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x.square().mean()


def batch_of(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(32, 512, generator=generator).cuda()


def sharded(model: Deep, **settings: Any) -> pylo_dist.ZeroOptimizer:
    """A bucket per layer."""
    return pylo_dist.ZeroOptimizer(
        model, pylo_dist.AdafacLO, weights="demo", bucket_cap_mb=1, **settings
    )


def wait_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is queued beside backward begins late, or backward does."""
    behind = Aside.behind

    @contextmanager
    def late(*args: Any, **kwargs: Any) -> Iterator[None]:
        if name == "backward":
            torch.cuda._sleep(SLOW)
        with behind(*args, **kwargs):
            if name == "aside":
                torch.cuda._sleep(SLOW)
            yield

    monkeypatch.setattr(Aside, "behind", late)


@pytest.mark.parametrize("late", ["aside", "backward", ""])
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_beside_backward_give_the_bits_of_those_in_the_step(
    stage: int, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes late; also with gradients of two passes, and after somebody has scaled them."""
    ends = []
    for overlap in (False, True):
        model = Deep().cuda()
        optimizer = sharded(model, stage=stage, overlap=overlap)
        if overlap:
            wait_before(late, monkeypatch)
        for step in range(4):
            for rank in range(1 + step % 2):
                model(batch_of(step, rank)).backward()
            if step == 2:
                for group in optimizer.param_groups:
                    torch._foreach_mul_([p.grad for p in group["params"]], 0.5)
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.synchronize()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


def test_the_stream_of_backward_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last gradient is there long before all buckets are; whoever comes after backward waits
    for these.
    """
    model, x = Deep().cuda(), batch_of(0, 0).requires_grad_()
    optimizer = sharded(model, stage=1)
    model(x).backward()
    optimizer.step()
    optimizer.zero_grad()
    wait_before("aside", monkeypatch)
    begin, last, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    x.register_hook(lambda _: last.record())
    loss = model(x)
    begin.record()
    loss.backward()
    end.record()
    torch.cuda.synchronize()
    assert begin.elapsed_time(last) < 0.5 * begin.elapsed_time(end)
    assert begin.elapsed_time(end) > DEEP * 5.0  # ms, of the waits


@pytest.mark.parametrize("stage", [1, 2])
def test_backward_and_step_replay_in_a_graph(stage: int) -> None:
    """The reducer's stream joins the one that is captured, and parts from it again."""
    ends = []
    for captured in (False, True):
        model = Deep().cuda()
        optimizer, x = sharded(model, stage=stage), batch_of(0, 0)

        def step(model: Deep = model, optimizer: Any = optimizer, x: torch.Tensor = x) -> None:
            model(x).backward()
            optimizer.step()
            optimizer.zero_grad()

        apart = torch.cuda.Stream()
        apart.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(apart):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(apart)
        run = step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            run = graph.replay
        for number in range(1, 4):
            x.copy_(batch_of(number, 0))
            run()
        torch.cuda.synchronize()
        ends.append([p.detach().clone() for p in model.parameters()])
    # cuBLAS may take other kernels inside a graph
    for want, got in zip(*ends, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def one_averaging_rank(rank: int, world: int, backend: str, folder: str, stage: int) -> None:
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    try:
        model = Deep().cuda()
        optimizer = sharded(model, stage=stage)
        for step in range(4):
            model(batch_of(step, rank)).backward()
            optimizer.step()
            optimizer.zero_grad()
        params = {fqn: p.detach().cpu() for fqn, p in model.named_parameters()}
        torch.save(params, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("backend", "world"), [("gloo", 2), ("nccl", 1)])
def test_real_ranks_average_beside_backward(
    backend: str, world: int, stage: int, tmp_path: Path
) -> None:
    """Hooks, overlap and gathering: the layout tolerance beside one process that has all
    gradients.
    """
    model = Deep().cuda()
    optimizer = pylo_dist.AdafacLO(list(model.named_parameters()), weights="demo")

    def now() -> dict[str, torch.Tensor]:
        return {fqn: p.detach().clone() for fqn, p in model.named_parameters()}

    history = [now()]
    for step in range(4):
        for rank in range(world):
            (model(batch_of(step, rank)) / world).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(now())
    mp.spawn(one_averaging_rank, args=(world, backend, str(tmp_path), stage), nprocs=world)
    for rank in range(world):
        theirs = {fqn: p.cuda() for fqn, p in torch.load(tmp_path / f"{rank}.pt").items()}
        errors = layout_error(theirs, history[-1], largest_changes(history))
        assert max(errors.values()) <= 1.0, errors

"""Optimizers that have a part of a model alone, while other ranks have the rest: stages of a
pipeline and what torch's ZeroRedundancyOptimizer deals out. Exact where nothing crosses tensors,
refused by name where something does; and uneven inputs under Join.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms import Join
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

import pylo_dist
from pylo_dist.layouts.company import part_of
from support.optimizers import CELO2, VELO
from support.ranks import run_ranks
from support.sharded_model import whole

STEPS, WIDTH, MICRO_BATCHES, STAGES, COPIES = 3, 8, 2, 2, 2
ARGUMENTS: dict[str, dict[str, Any]] = {
    "AdafacLO": {"weights": "demo"},
    "CELO2": {"weights": CELO2},
    "VeLO": {"weights": VELO, "num_steps": 100},
}
BOUND = 0.01  # of the norm over all tensors, far below it


def model() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))
    return nn.Sequential(*blocks).double()


def samples(step: int, copy: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + copy)
    x, y = torch.randn(2, 4, WIDTH, generator=generator, dtype=torch.float64)
    return x, y


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: whole(param).detach().clone() for name, param in module.named_parameters()}


def of_one_process(name: str, **settings: Any) -> dict[str, Tensor]:
    net = model()
    face = getattr(pylo_dist, name)
    optimizer = face(net.named_parameters(), **{**ARGUMENTS[name], **settings})
    for step in range(STEPS):
        parts = [samples(step, copy) for copy in range(COPIES)]
        x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        optimizer.zero_grad()
        loss = mean_square(net(x), y)
        loss.backward()
        optimizer.step(loss)
    return values(net)


# -------------------------------------------------------------------------------------- pipelines


class Pipeline:
    """Two stages on two ranks each, of which the copies have other samples."""

    def __init__(self, rank: int) -> None:
        self.number, self.copy = divmod(rank, COPIES)
        rows = [dist.new_group([copy, copy + COPIES]) for copy in range(COPIES)]
        columns = [dist.new_group([2 * stage, 2 * stage + 1]) for stage in range(STAGES)]
        self.row, self.column = rows[self.copy], columns[self.number]

    def run(
        self,
        name: str,
        schedule: Any = ScheduleGPipe,
        *,
        before_step: Callable[[Any, Any], None] | None = None,
        zero: dict[str, Any] | None = None,
        fsdp: bool = False,
        **settings: Any,
    ) -> dict[str, Tensor] | str:
        """This stage's parameters after all steps, or what the first one was refused with.

        Args:
            before_step: called with this object and the optimizer.
            zero: arguments of ZeroOptimizer; without it, or `fsdp`, the copies' gradients are
                averaged here.
        """
        net, own = model(), nn.Sequential()
        for i in (2 * self.number, 2 * self.number + 1):
            own.add_module(str(i), net[i])
        if fsdp:
            fully_shard(own, mesh=DeviceMesh.from_group(self.column, "cpu"))
        stage = PipelineStage(own, self.number, STAGES, torch.device("cpu"), group=self.row)
        pipeline = schedule(stage, MICRO_BATCHES, loss_fn=mean_square)
        face, before = getattr(pylo_dist, name), values(own)
        arguments = {**ARGUMENTS[name], **settings}
        optimizer: Any = (
            face(own.named_parameters(), **arguments)
            if zero is None
            else pylo_dist.ZeroOptimizer(
                own, face, process_group=self.column, **{"overlap": False, **zero}, **arguments
            )
        )
        try:
            for step in range(STEPS):
                optimizer.zero_grad()
                x, y = samples(step, self.copy)
                losses: list[Tensor] = []
                if self.number == 0:
                    pipeline.step(x)
                else:
                    pipeline.step(target=y, losses=losses)
                loss = torch.stack(losses).mean() if losses else torch.zeros((), dtype=x.dtype)
                dist.broadcast(loss, self.copy + COPIES, group=self.row)
                for param in own.parameters() if zero is None and not fsdp else ():
                    dist.all_reduce(param.grad, group=self.column)
                    param.grad /= COPIES
                if before_step is not None:
                    before_step(self, optimizer)
                optimizer.step(loss)
        except ValueError as error:
            assert all(torch.equal(before[fqn], p) for fqn, p in values(own).items())
            return str(error)
        return values(own)


def clip_over_stages(pipeline: Pipeline, optimizer: Any) -> None:
    """What the errors say to do instead of max_grad_norm."""
    params = optimizer.param_groups[0]["params"]
    square = nn.utils.get_total_norm([param.grad for param in params]).square()
    dist.all_reduce(square, group=pipeline.row)
    nn.utils.clip_grads_with_norm_(params, BOUND, square.sqrt())


EXACT: dict[str, dict[str, Any]] = {
    "plain, 1F1B": {"name": "AdafacLO", "schedule": Schedule1F1B},
    "plain, CELO2": {"name": "CELO2"},
    "plain, clipped over the stages": {"name": "AdafacLO", "before_step": clip_over_stages},
    "plain, clipped by tensor": {"name": "AdafacLO", "max_grad_norm": BOUND, "clip": "per_tensor"},
    "FSDP2": {"name": "AdafacLO", "fsdp": True},
    "ZeRO-1": {"name": "AdafacLO", "zero": {"stage": 1}},
}
# what one process is told where a pipeline is told otherwise
ALONE = {"plain, clipped over the stages": {"max_grad_norm": BOUND}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "VeLO": ({"name": "VeLO"}, "couples all tensors of a model"),
    "VeLO, ZeRO": ({"name": "VeLO", "zero": {}}, "couples all tensors of a model"),
    "VeLO, FSDP2": ({"name": "VeLO", "fsdp": True}, "couples all tensors of a model"),
    "norm": ({"name": "AdafacLO", "max_grad_norm": BOUND}, "max_grad_norm bounds the norm over"),
    "norm, ZeRO": (
        {"name": "AdafacLO", "max_grad_norm": BOUND, "zero": {}},
        "max_grad_norm bounds the norm over",
    ),
    "skip": ({"name": "AdafacLO", "nonfinite": "skip"}, 'nonfinite="skip" passes over'),
    "clip_grad_norm_": (
        {"name": "AdafacLO", "before_step": lambda _, own: pylo_dist.clip_grad_norm_(own, 1.0)},
        "whose norm is not that of the model",
    ),
    # the schedule divides gradients by the number of micro-batches after the last backward pass
    "stage 2": ({"name": "AdafacLO", "zero": {"stage": 2}}, "freed it"),
    "overlap": ({"name": "AdafacLO", "zero": {"overlap": True}}, "overlap=False and stage=1"),
}


def in_stages(rank: int, world: int) -> dict[str, Any]:
    pipeline = Pipeline(rank)
    found: dict[str, Any] = {case: pipeline.run(**settings) for case, settings in EXACT.items()}
    found |= {case: pipeline.run(**settings) for case, (settings, _) in REFUSED.items()}
    net = model()
    parts = net[:2], net[2:]
    stages = [
        PipelineStage(part, i, STAGES, torch.device("cpu"), group=pipeline.row)
        for i, part in enumerate(parts)
    ]
    found["parts"] = [part_of(None, list(m.parameters())) for m in (net, *parts, model())]
    assert len(stages) == STAGES
    found["joined"], found["dealt"] = joined(rank), dealt(rank)
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(STAGES * COPIES, in_stages)


def away(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """As a share of the largest change of the tensor."""
    start = values(model())
    return max(
        float((found[fqn] - wanted[fqn]).abs().max() / (wanted[fqn] - start[fqn]).abs().max())
        for fqn in found
    )


@pytest.mark.parametrize("case", EXACT)
def test_a_stage_steps_as_one_process_does(results: list[dict[str, Any]], case: str) -> None:
    settings = {**EXACT[case], **ALONE.get(case, {})}
    own = ("name", "schedule", "before_step", "zero", "fsdp")
    wanted = of_one_process(
        settings["name"], **{key: value for key, value in settings.items() if key not in own}
    )
    # gradients are added up in another order, over micro-batches and copies
    assert max(away(result[case], wanted) for result in results) < 1e-9
    assert {fqn for result in results for fqn in result[case]} == wanted.keys()


@pytest.mark.parametrize("case", REFUSED)
def test_what_crosses_stages_is_refused_on_all_of_them(
    results: list[dict[str, Any]], case: str
) -> None:
    for rank, result in enumerate(results):
        said = result[case]
        assert isinstance(said, str), f"{case} was taken"
        assert REFUSED[case][1] in said, said
        if case not in ("stage 2", "overlap"):
            assert f"stage {rank // COPIES} of the 2 of a pipeline" in said, said


def test_all_stages_in_one_optimizer_are_the_whole_model(results: list[dict[str, Any]]) -> None:
    which = "stage {} of the 2 of a pipeline (torch.distributed.pipelining)"
    for result in results:
        assert result["parts"] == [None, which.format(0), which.format(1), None]


# ------------------------------------------------------------------------------ Join, dealt tensors


def joined(rank: int) -> list[str]:
    """What a step says under Join, and whether anything moved."""
    said = []
    for kind, settings in (
        ("AdafacLO", {}),
        ("VeLO", {}),
        ("AdafacLO", {"zero": True}),
        ("AdamW", {"zero": True}),
        ("AdafacLO", {"throw_on_early_termination": True}),
    ):
        net = DistributedDataParallel(model())
        face = getattr(pylo_dist, kind, torch.optim.AdamW)
        arguments = ARGUMENTS.get(kind, {})
        optimizer: Any = (
            pylo_dist.ZeroOptimizer(net, face, **arguments)
            if settings.pop("zero", False)
            else face(net.named_parameters(), **arguments)
        )
        before = values(net)
        try:
            with Join([net], **settings):
                x, y = samples(0, rank)
                loss = mean_square(net(x), y)
                loss.backward()
                optimizer.step(loss)
            said.append("taken")
        except ValueError as error:
            assert all(torch.equal(before[fqn], p) for fqn, p in values(net).items())
            said.append(str(error))
    return said


def dealt(rank: int) -> list[Any]:
    """Two steps of torch's ZeroRedundancyOptimizer around ours, or what the first says."""
    found: list[Any] = []
    for kind, settings in (("AdafacLO", {}), ("AdafacLO", {"max_grad_norm": BOUND}), ("VeLO", {})):
        net = model()
        wrapped = DistributedDataParallel(net)
        face: Any = getattr(pylo_dist, kind)
        optimizer = ZeroRedundancyOptimizer(
            wrapped.parameters(), optimizer_class=face, **{**ARGUMENTS[kind], **settings}
        )
        try:
            for step in range(STEPS):
                optimizer.zero_grad()
                x, y = samples(step, rank % COPIES)
                loss = mean_square(wrapped(x), y)
                loss.backward()
                optimizer.step(loss=loss.detach())
            found.append(values(net))
        except ValueError as error:
            found.append(str(error))
    return found


def test_uneven_inputs_are_refused_by_name(results: list[dict[str, Any]]) -> None:
    for result in results:
        *refused, even = result["joined"]
        for said in refused:
            assert "under torch.distributed.algorithms.Join" in said
            assert "drop_last=True" in said
        assert even == "taken"


def test_dealt_tensors_step_alone_or_are_refused(results: list[dict[str, Any]]) -> None:
    wanted = of_one_process("AdafacLO")
    for result in results:
        exact, norm, coupled = result["dealt"]
        assert away(exact, wanted) < 1e-9
        for said in (norm, coupled):
            assert "of 8 tensors, as torch's ZeroRedundancyOptimizer deals them" in said

"""Optimizer objects given to `deepspeed.initialize`, on ranks: runs beside those of the JSON entry,
and what is said of objects that cannot be served.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

import pylo_dist
from support import deepspeed_cases as cases
from support.deepspeed_cases import Case

BF16 = {"bf16": {"enabled": True}}
FP32_SUMS = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
CASES = {
    "stage 0": Case(0, groups=True, steps=4),
    "stage 1": Case(1, "VeLO", groups=True, steps=4),
    "stage 2": Case(2, "ELO_CELO2", micros=2, steps=4, extra={"gradient_clipping": 0.25}),
    "stage 2, CPU offload": Case(2, steps=4, zero={"offload_optimizer": {"device": "cpu"}}),
    "stage 3": Case(3, "MuLO", groups=True, steps=4, zero={"sub_group_size": 300}),
    "stage 3, zero.Init": Case(3, "VeLO", groups=True, zero_init=True, steps=4),
    "bfloat16, stage 0": Case(0, groups=True, steps=4, extra=BF16),
    "bfloat16, stage 1": Case(1, "VeLO", groups=True, steps=4, extra=FP32_SUMS),
    "bfloat16, stage 2": Case(2, groups=True, steps=4, extra=BF16),
    "bfloat16, stage 3": Case(3, groups=True, steps=4, extra=BF16),
}
SAME = {"rates": True, "masters": True, "params": True, "object": True, "hooks": True}
REFUSED = {
    "steps": "AdafacLO given to deepspeed.initialize: it has taken 1 steps",
    "one rank": "it has taken 1 steps",
    "other model": "'group0.0' is no parameter of the model given to deepspeed.initialize",
    "other names": "'net.embedding.weight' is 'embedding.weight' in the model given",
    "bound": '"max_grad_norm": 1.0: DeepSpeed clips before the optimizer',
    "bound of a group": "parameter group 0 has max_grad_norm=2.0: DeepSpeed clips",
    "ranks": '"process_group": False: DeepSpeed says which ranks',
    "unknown face": "DeepSpeed was given a Own, which is not registered",
    "zero": "DeepSpeed was given a ZeroOptimizer",
    "twice": "AdafacLO belongs to another DeepSpeed engine already",
    "exchanged": "AdamW was made of the parameter groups of a learned optimizer",
    "setting": '"zero_optimization.elastic_checkpoint": True is not served',
}


def schedule(optimizer: Any, speed: int = 1) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: min(1.0, (speed * step + 1) / 5))


def compared(files: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Per case, in what the object's run equals that of the JSON entry, to the bit."""
    found = {}
    for name, case in CASES.items():
        engine = cases.build(case, files)
        wanted = run(engine, case, schedule(engine.basic_optimizer))
        model, optimizer, config = made(case, files)
        groups, calls = optimizer.param_groups, []
        optimizer.register_step_post_hook(lambda *_, seen=calls: seen.append(None))
        scheduler = schedule(optimizer)
        # DeepSpeed also takes a function of the parameters
        offered = (lambda _, own=optimizer: own) if name == "stage 0" else optimizer
        engine = initialized(model, offered, config)
        got = run(engine, case, scheduler)
        same = {
            key: all(torch.equal(got[key][fqn], value) for fqn, value in wanted[key].items())
            for key in ("masters", "params")
        }
        found[name] = {
            **same,
            "rates": got["rates"] == wanted["rates"],
            "object": optimizer is engine.basic_optimizer and optimizer.param_groups is groups,
            "hooks": bool(calls),
        }
    return found


def accelerated(files: dict[str, str]) -> bool:
    """Whether accelerate's DeepSpeed, with an object and a scheduler, ends as the JSON entry."""
    accelerate = pytest.importorskip("accelerate")
    case = Case(2, "VeLO", groups=True, steps=4)
    model, optimizer, config = made(case, files)
    plugin = accelerate.utils.DeepSpeedPlugin(hf_ds_config=config)
    accelerator = accelerate.Accelerator(deepspeed_plugin=plugin)
    engine = cases.build(case, files)
    # accelerate steps schedulers once for every process that it knows of
    scheduler = schedule(engine.basic_optimizer, accelerator.num_processes)
    wanted = run(engine, case, scheduler)["masters"]
    engine, stepper, stepping = accelerator.prepare(model, optimizer, schedule(optimizer))
    rank = torch.distributed.get_rank()
    for step in range(case.steps):
        loss = engine(cases.coefficients(step, 0, rank), cases.loss_of(step, 0, rank))
        accelerator.backward(loss)
        stepper.step()
        stepping.step()
        stepper.zero_grad()
    got = cases.masters(engine)
    engine.destroy()
    return all(torch.equal(got[fqn][1], piece) for fqn, piece in wanted.items())


def made(case: Case, files: dict[str, str], **changed: Any) -> tuple[Any, Any, dict[str, Any]]:
    """A model, an optimizer object as the case's JSON entry says, and the JSON without it.

    Args:
        changed: further arguments of the optimizer.
    """
    config = case.json(files)
    params = config.pop("optimizer")["params"]
    model, given = cases.model_of(case, config)
    if case.rule == "MuLO":  # whose multipliers go by name
        fqns = {param: fqn for fqn, param in model.named_parameters()}
        given = [{**g, "params": [(fqns[param], param) for param in g["params"]]} for g in given]
    return model, cases.SERVED[case.rule].face(given, **{**params, **changed}), config


def initialized(model: Any, optimizer: Any, config: dict[str, Any]) -> Any:
    return cases.import_deepspeed().initialize(model=model, optimizer=optimizer, config=config)[0]


def run(engine: Any, case: Case, scheduler: LambdaLR) -> dict[str, Any]:
    """What a run ends with, and the rates of its steps; the engine is gone after it."""
    rates = []
    for step in range(case.steps):
        rates.append([group["lr"] for group in engine.basic_optimizer.param_groups])
        cases.train(engine, step, step + 1, case.micros)
        with warnings.catch_warnings():  # that the optimizer had not stepped before it
            warnings.simplefilter("error")
            scheduler.step()
    rates.append([group["lr"] for group in engine.basic_optimizer.inner.param_groups])
    masters = {fqn: piece for fqn, (_, piece) in cases.masters(engine).items()}
    found = {"rates": rates, "masters": masters, "params": cases.whole_params(engine)}
    engine.destroy()
    return found


class Own(pylo_dist.AdafacLO):
    """A face that nobody registered."""


def refused(rank: int, files: dict[str, str]) -> dict[str, str]:
    """What is said of objects that cannot be served, on this rank, and of one that can after it."""
    case, weights = Case(2, steps=2), {"weights": files["AdafacLO"]}
    said = {}

    def try_out(name: str, spoil: Callable[[Any, Any], Any], **changed: Any) -> None:
        model, optimizer, config = made(case, files, **changed)
        optimizer = spoil(model, optimizer) or optimizer
        if name == "setting":
            config["zero_optimization"]["elastic_checkpoint"] = True
        before = dict(optimizer.param_groups[0])
        try:
            initialized(model, optimizer, config)
            said[name] = "nothing"
        except ValueError as error:
            said[name] = str(error)
        kept = optimizer.param_groups[0]
        if kept.keys() != before.keys() or any(kept[key] is not before[key] for key in kept):
            said[name] += ", and it was changed"

    def step(model: Any, optimizer: Any) -> None:
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()

    def named(model: Any, _: Any) -> Any:
        pairs = [(f"net.{fqn}", param) for fqn, param in model.named_parameters()]
        return pylo_dist.AdafacLO(pairs, **weights)

    try_out("steps", step)
    try_out("one rank", step if rank == 0 else lambda *_: None)
    try_out("other model", lambda *_: made(case, files)[1])
    try_out("other names", named)
    try_out("bound", lambda *_: None, max_grad_norm=1.0)
    try_out("bound of a group", lambda _, own: own.param_groups[0].update(max_grad_norm=2.0))
    try_out("ranks", lambda *_: None, process_group=False)
    try_out("unknown face", lambda model, _: Own(model.parameters(), **weights))
    try_out("exchanged", lambda _, own: torch.optim.AdamW(own.param_groups))
    try_out("setting", lambda *_: None)
    model, optimizer, config = made(case, files)
    engine = initialized(model, optimizer, config)
    try_out("twice", lambda *_: optimizer)
    engine.destroy()
    sharded = [torch.nn.Parameter(torch.ones(4, 3))]
    zero = pylo_dist.ZeroOptimizer(sharded, pylo_dist.AdafacLO, **weights)
    try_out("zero", lambda *_: zero)
    # a copy knows how it was built, and defaults may be said
    *pair, config = made(case, files, max_grad_norm=None, clip="global")
    engine = initialized(*copy.deepcopy(pair), config)
    cases.train(engine, 0, 1)
    engine.destroy()
    return said

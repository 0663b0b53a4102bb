"""Checkpoints of DeepSpeed engines: the same ranks bit for bit, other ranks, stages and layouts
within the layout tolerance.
"""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pylo_dist import checkpoint
from pylo_dist.testing import largest_changes, layout_error
from support import deepspeed_cases as cases
from support.deepspeed_cases import Case
from support.pickles import Loud
from support.ranks import run_ranks

pytest.importorskip(
    "deepspeed", reason="DeepSpeed is not installed: launch/setup.sh launch,dev,deepspeed"
)

BF16 = {"bf16": {"enabled": True}}
FP32_SUMS = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
RISE = {"warmup_min_lr": 0.5, "warmup_max_lr": 1.0, "warmup_num_steps": 4, "warmup_type": "linear"}
SCHEDULER = {"scheduler": {"type": "WarmupLR", "params": RISE}}
RATES = [0.5, 0.5, 0.625, 0.75, 0.875, 1.0]  # what that schedule gives; checked below
HALF, END = 3, 6
SAVED = {
    "stage 0": Case(0, "VeLO", steps=END),
    "stage 0, bfloat16": Case(0, extra=BF16, steps=END),
    "stage 1": Case(1, "VeLO", groups=True, steps=END, zero={"round_robin_gradients": True}),
    "stage 1, fp32 sums": Case(1, "AdafacLO_halved", groups=True, extra=FP32_SUMS, steps=END),
    "stage 2": Case(2, "ELO_CELO2", extra=SCHEDULER, steps=END),
    "stage 2, bfloat16": Case(2, "VeLO", extra=BF16, steps=END),
    "stage 3": Case(
        3,
        "VeLO",
        groups=True,
        steps=END,
        zero={"sub_group_size": 50, "stage3_param_persistence_threshold": 30},
    ),
    "stage 3, bfloat16": Case(
        3, extra=BF16, steps=END, zero={"stage3_param_persistence_threshold": 30}
    ),
}
# Into which stage each of them is loaded on another number of ranks.
INTO = {
    "stage 0": ("stage 2", 2),
    "stage 0, bfloat16": ("stage 0", 0),
    "stage 1": ("stage 3", 3),
    "stage 1, fp32 sums": ("stage 1", 1),
    "stage 2": ("stage 2", 2),
    "stage 2, bfloat16": ("stage 3", 3),
    "stage 3": ("stage 1", 1),
    "stage 3, bfloat16": ("stage 3", 3),
}
FROZEN, SEEN = 0.25, 5.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, str]:
    return cases.write_weights(folder)


@pytest.fixture(scope="module")
def saved(folder: Path, files: dict[str, str]) -> list[dict[str, Any]]:
    """What 2 ranks saved in `folder`, and how they went on."""
    return run_ranks(2, save, str(folder), files)


def save(rank: int, world: int, folder: str, files: dict[str, str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    deepspeed = cases.import_deepspeed()
    import pylo_dist.deepspeed

    for name, case in SAVED.items():
        engine = cases.build(case, files)
        cases.train(engine, 0, HALF)
        halfway = cases.masters(engine)
        engine.module.seen.fill_(SEEN)
        frozen = engine.module.frozen.weight
        with (
            deepspeed.zero.GatheredParameters([frozen], modifier_rank=0, enabled=case.stage == 3),
            torch.no_grad(),
        ):
            frozen.fill_(FROZEN)
        engine.save_checkpoint(f"{folder}/{name}", client_state={"note": name})
        if "bfloat16" not in name:
            checkpoint.save(
                f"{folder}/{name} canonical",
                pylo_dist.deepspeed.states(engine),
                meta={"step": HALF},
            )
        cases.train(engine, HALF, END)
        engine.destroy()
        resumed = cases.build(case, files)
        _, client = resumed.load_checkpoint(f"{folder}/{name}")
        cases.train(resumed, HALF, END)
        results[name] = {
            "halfway": halfway,
            "masters": cases.masters(engine),
            "resumed": cases.masters(resumed),
            "params": cases.whole_params(resumed),
            "state": local_state(engine),
            "resumed state": local_state(resumed),
            "note": client["note"],
            "steps": resumed.global_steps,
        }
        try:  # another stage, the same ranks
            if name == "stage 1":
                other = cases.build(Case(2, "VeLO", groups=True, steps=END), files)
                other.load_checkpoint(f"{folder}/{name}")
                results["other layout"] = "nothing"
        except ValueError as error:
            results["other layout"] = str(error)
        resumed.destroy()
    return results


def local_state(engine: Any) -> dict[str, Tensor]:
    state = engine.basic_optimizer.state_dict()["pylo_dist"]["optimizer"]
    flat = {
        f"{i}.{k}": v["local"] if isinstance(v, dict) else v
        for i, entry in state["state"].items()
        for k, v in entry.items()
    }
    groups = {
        f"{i}.{k}": v
        for i, g in enumerate(state["param_groups"])
        for k, v in g.items()
        if isinstance(v, Tensor)
    }
    return {k: v.clone() for k, v in {**flat, **groups}.items()}


def test_the_same_ranks_go_on_bit_for_bit(saved: list[dict[str, Any]]) -> None:
    for name in SAVED:
        for rank in saved:
            result = rank[name]
            for fqn, (start, values) in result["masters"].items():
                assert result["resumed"][fqn][0] == start
                assert torch.equal(result["resumed"][fqn][1], values), (name, fqn)
            assert result["state"].keys() == result["resumed state"].keys()
            for key, values in result["state"].items():
                assert torch.equal(result["resumed state"][key], values), (name, key)
            assert torch.equal(
                result["params"]["frozen.weight"].float(), torch.full((3,), FROZEN)
            ), name
            assert result["note"] == name
            assert result["steps"] == END
    for rank in saved:
        assert "pylo_dist.deepspeed.load_checkpoint(engine, folder)" in rank["other layout"]


def load(rank: int, world: int, folder: str, files: dict[str, str]) -> dict[str, Any]:
    cases.import_deepspeed()
    import pylo_dist.deepspeed

    results: dict[str, Any] = {}
    for name, case in SAVED.items():
        _, stage = INTO[name]
        zero = {"sub_group_size": 200} if stage == 3 else {}
        into = Case(stage, case.rule, groups=case.groups, extra=case.extra, zero=zero, steps=END)
        engine = cases.build(into, files)
        _, client = pylo_dist.deepspeed.load_checkpoint(engine, f"{folder}/{name}")
        lr = engine.get_lr()[0]
        cases.train(engine, HALF, END)
        results[name] = {
            "masters": cases.masters(engine),
            "params": cases.whole_params(engine),
            "seen": engine.module.seen.clone(),
            "note": client,
            "steps": engine.global_steps,
            "lr": lr,
            "type": type(engine.optimizer).__name__,
        }
        engine.destroy()
    for source, stage in (("stage 1", 0), ("stage 3", 2), ("stage 0", 3)):
        case = SAVED[source]
        engine = cases.build(Case(stage, case.rule, groups=case.groups, steps=END), files)
        _, meta = checkpoint.load(
            f"{folder}/{source} canonical", pylo_dist.deepspeed.states(engine)
        )
        assert meta == {"step": HALF}
        cases.train(engine, HALF, END)
        results[f"canonical {source}"] = {
            "masters": cases.masters(engine),
            "params": cases.whole_params(engine),
        }
        engine.destroy()
    results["without DeepSpeed"] = without_deepspeed(rank, world, folder, files)
    engine = cases.build(SAVED["stage 2"], files)
    said = []
    for name, tag in (("stage 1", None), ("stage 2", "nothing"), ("nowhere", None)):
        try:
            pylo_dist.deepspeed.load_checkpoint(engine, f"{folder}/{name}", tag)
        except ValueError as error:
            said.append(str(error))
    results["errors"] = said
    if world == 1:
        results["own tools"] = own_tools(Path(folder))
        results["odd files"] = odd_files(Path(folder), engine)
    return results


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change a file's entries (in place)."""

    def edit(path: Path) -> None:
        entries = torch.load(path, weights_only=False)
        change(entries)
        torch.save(entries, path)

    return edit


def held(entries: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = entries["optimizer_state_dict"]["base_optimizer_state"]["pylo_dist"]
    return found


MODEL, STATES = "mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"
ODD: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "cut model": (MODEL, cut),
    "cut state": (STATES, cut),
    "no file": (STATES, Path.unlink),
    "a folder": (STATES, lambda path: (path.unlink(), path.mkdir())),
    "no dict": (MODEL, lambda path: torch.save([1], path)),
    "a class": (MODEL, edited(lambda e: e.update(note=Loud()))),
    "no state": (STATES, edited(lambda e: e.pop("optimizer_state_dict"))),
    "a text": (STATES, edited(lambda e: held(e).update(layout="none"))),
    "no places": (STATES, edited(lambda e: held(e)["layout"].update(pieces=[[1]]))),
    "another place": (STATES, edited(lambda e: held(e)["layout"]["pieces"][0].__setitem__(2, 999))),
    "no groups": (
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        edited(lambda e: held(e)["optimizer"].update(param_groups=[1])),
    ),
    "no numbers": (STATES, edited(lambda e: held(e)["optimizer"].update(state={0: 3}))),
    "steps": (MODEL, edited(lambda e: e.update(global_steps="x"))),
    "scheduler": (MODEL, edited(lambda e: e.update(lr_scheduler={"last_batch_iteration": "x"}))),
    "no scheduler": (MODEL, edited(lambda e: e.update(lr_scheduler=[]))),
    "buffers": (MODEL, edited(lambda e: e["module"].update(seen=torch.zeros(3)))),
    "frozen": (MODEL, edited(lambda e: e.update(frozen_param_shapes={"frozen.weight": (4,)}))),
    "no module": (MODEL, edited(lambda e: e.pop("module"))),
    "converted": ("zero", Path.mkdir),
}


class ByName:
    """A member of an enum as Python 3.11.0 to 3.11.3 pickle it."""

    def __reduce__(self) -> Any:
        from deepspeed.runtime.zero.config import ZeroStageEnum

        return getattr, (ZeroStageEnum, "gradients")


def own_tools(folder: Path) -> dict[str, Any]:
    """What DeepSpeed's own converters make of the folders: whole float32 tensors, or an error."""
    from deepspeed.checkpoint import ds_to_universal
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    found: dict[str, Any] = {}
    for name, case in SAVED.items():
        # of stage 0 the model file is whole, and BF16_Optimizer's files they both refuse
        if case.stage == 0 or case.extra is FP32_SUMS:
            continue
        found[name] = dict(get_fp32_state_dict_from_zero_checkpoint(f"{folder}/{name}"))
        flags = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
        arguments = Namespace(
            input_folder=f"{folder}/{name}/global_step{HALF}",
            output_folder=f"{folder}/universal {name}",
            num_extract_workers=1,
            num_merge_workers=1,
            **flags,
        )
        try:
            ds_to_universal.main(arguments)
            found[f"universal {name}"] = "converted"
        except KeyError as error:
            found[f"universal {name}"] = str(error)
    return found


def odd_files(folder: Path, engine: Any) -> dict[str, Any]:
    """What is looked up in files of DeepSpeed's, and what is said of odd ones; by name, with
    whether anything of the engine changed.
    """
    import pylo_dist.deepspeed

    by_name = edited(lambda e: e["optimizer_state_dict"].update(zero_stage=ByName()))
    by_name(folder / "stage 2" / f"global_step{HALF}" / STATES)
    looked_up: set[Any] = set()
    sys.addaudithook(
        lambda event, a: looked_up.add(a[1:]) if event == "pickle.find_class" else None
    )

    def now() -> dict[str, Tensor]:
        masters = {fqn: values for fqn, (_, values) in cases.masters(engine).items()}
        params = {f"model {name}": p for name, p in cases.whole_params(engine).items()}
        counts = torch.tensor([engine.global_steps, engine.lr_scheduler.last_batch_iteration])
        return {
            **masters,
            **params,
            **local_state(engine),
            "seen": engine.module.seen.clone(),
            "counts": counts,
        }

    pylo_dist.deepspeed.load_checkpoint(engine, folder / "stage 2")
    found: dict[str, Any] = {"looked up": sorted(looked_up)}
    cases.train(engine, HALF, HALF + 1)
    before = now()
    for name, (file, damage) in ODD.items():
        copy = Path(shutil.copytree(folder / "stage 2", folder / "odd"))
        damage(copy / f"global_step{HALF}" / file)
        said = []
        for read in (
            lambda copy=copy: pylo_dist.deepspeed.load_checkpoint(engine, copy),
            lambda copy=copy: pylo_dist.deepspeed.read_checkpoint(copy),
        ):
            try:
                read()
                said.append("read")
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
        after = now()
        found[name] = (said, [key for key in before if not torch.equal(before[key], after[key])])
        shutil.rmtree(copy)
    found["loud"] = Loud.read
    return found


def without_deepspeed(
    rank: int, world: int, folder: str, files: dict[str, str]
) -> dict[str, dict[str, Tensor]]:
    """The engine of stage 3 goes on as ZeroOptimizer: from DeepSpeed's files, and from the
    canonical folder.
    """
    import pylo_dist.deepspeed

    _, params = cases.rules(files)["VeLO"]
    found = {}
    for way in ("files", "canonical"):
        model = cases.Model()
        groups = cases.split_groups(model)
        names = {p: n for n, p in model.named_parameters()}
        named = [
            {**g, "params": [(names[p], p) for p in g["params"] if p.requires_grad]} for g in groups
        ]
        optimizer = pylo_dist.ZeroOptimizer(named, pylo_dist.VeLO, **params)
        if way == "files":
            read = pylo_dist.deepspeed.read_checkpoint(f"{folder}/stage 3")
            model.load_state_dict(read["model"])
            optimizer.load_state_dict(read["optimizer"])
            assert read["meta"]["global_steps"] == HALF
        else:
            checkpoint.load(f"{folder}/stage 3 canonical", {"model": model, "optimizer": optimizer})
        assert torch.equal(model.frozen.weight, torch.full((3,), FROZEN))
        assert torch.equal(model.seen, torch.full((2,), SEEN))
        for step in range(HALF, END):
            optimizer.zero_grad()
            loss = model(cases.coefficients(step, 0, rank), cases.loss_of(step, 0, rank))
            loss.backward()
            optimizer.step(loss)
        found[way] = {n: p.detach().clone() for n, p in model.named_parameters()}
        if way == "canonical":
            checkpoint.save(f"{folder}/zero {world}", {"model": model, "optimizer": optimizer})
            engine = cases.build(SAVED["stage 3"], files)
            checkpoint.load(f"{folder}/zero {world}", pylo_dist.deepspeed.states(engine))
            found["back"] = cases.whole_params(engine)
            engine.destroy()
    return found


@pytest.mark.parametrize("world", [1, 3])
def test_other_ranks_and_layouts_go_on(
    world: int, folder: Path, files: dict[str, str], saved: list[dict[str, Any]], figures: list[str]
) -> None:
    ranks = run_ranks(world, load, str(folder), files)
    worlds = [2] * HALF + [world] * (END - HALF)
    worst = 0.0
    for name in (*SAVED, *(key for key in ranks[0] if key.startswith("canonical "))):
        case = SAVED[name.removeprefix("canonical ")]
        rates = RATES if case.extra is SCHEDULER else ()
        history, _ = cases.unsharded(case, files, worlds, rates=rates)
        share = cases.SERVED[case.rule].share(torch.float32)
        got = cases.joined([rank[name]["masters"] for rank in ranks])
        errors = layout_error(
            got, {f: history[-1][f] for f in got}, largest_changes(history), share
        )
        assert max(errors.values()) <= 1.0, (name, errors)
        worst = max(worst, *errors.values())
        for rank in ranks:
            params = rank[name]["params"]
            assert torch.equal(params["frozen.weight"].float(), torch.full((3,), FROZEN)), name
            assert all(torch.equal(p, ranks[0][name]["params"][f]) for f, p in params.items())
            # the model has what the float32 tensors say, rounded once
            for fqn, whole in got.items():
                assert torch.equal(params[fqn], whole.to(params[fqn].dtype)), (name, fqn)
            if name in SAVED:
                assert torch.equal(rank[name]["seen"].float(), torch.full((2,), SEEN))
                assert rank[name]["note"] == {"note": name}
                assert rank[name]["steps"] == END
        if rates:
            assert ranks[0][name]["lr"] == RATES[HALF]
    history, _ = cases.unsharded(SAVED["stage 3"], files, worlds)
    for way, got in ranks[0]["without DeepSpeed"].items():
        errors = layout_error(
            got,
            {f: h for f, h in history[-1].items() if f != "frozen.weight"},
            largest_changes(history),
        )
        assert max(errors.values()) <= 1.0, (way, errors)
    for rank in ranks:
        other_model, no_tag, nowhere = rank["errors"]
        assert "state_rule" in other_model or "groups" in other_model
        assert "nothing has no *_model_states.pt" in no_tag
        assert "latest is missing" in nowhere
    if world == 1:
        odd = ranks[0]["odd files"]
        assert odd.pop("looked up") == []
        assert odd.pop("loud") is False
        for name, (said, changed) in odd.items():
            assert said[0].startswith("ValueError: "), (name, said)
            assert said[1].startswith(("ValueError: ", "read")), (name, said)
            assert not changed, name
        assert "add_safe_globals" in odd["a class"][0][0]
        assert f"{STATES} is truncated or damaged" in odd["cut state"][0][0]
        assert "written by DeepSpeed's ds_to_universal" in odd["converted"][0][0]
        tools = ranks[0]["own tools"]
        for name in SAVED:
            if name in tools:
                whole = cases.joined([rank[name]["halfway"] for rank in saved])
                assert all(torch.equal(tools[name][fqn], p) for fqn, p in whole.items()), name
                # it knows Adam's moments alone, and must not leave ours out in silence
                assert tools[f"universal {name}"] == "'exp_avg'", name
        assert len(tools) == 2 * 5
    figures.append(
        f"DeepSpeed checkpoints | 2 to {world} ranks | at most {worst:.2g} of the layout tolerance"
    )

"""bench_quality.py trains what it says, goes on where it was interrupted, and its tables are those
of the JSON. That it runs and is drawn: test_benchmarks.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import bench_quality
import pytest
import quality
import torch
from bench_quality import CONTENDERS, QUICK, TASKS, MuonAndAdamW, Pupil, RoundedProducts, Run
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import pylo_dist

ROOT = Path(__file__).parents[2]
IMAGES = QUICK[1]


def weights_in(folder: Path, seed: int) -> Path:
    """Random weights under the names of the real ones."""
    for name in ("celo", "celo2"):
        tensors = pylo_dist.random_weights(name, seed).tensors
        save_file(dict(tensors), folder / f"{name}.safetensors")
    return folder


def test_interrupted_runs_go_on_and_others_are_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, done, until = tmp_path / "quality.json", [], 3

    def measure(run: Run, weights: Path | None) -> dict[str, Any]:
        if len(done) == until:
            raise KeyboardInterrupt
        done.append(run.name)
        return {
            "task": str(run.task),
            "name": run.name,
            "seed": run.seed,
            "asked": run.asked(),
            "val_loss": {"4": 2.0},
            "cpu_s": {"4": 1.0},
            "optimizer_share": 0.5,
            "diverged_at": None,
        }

    def start(*words: str) -> list[str]:
        done.clear()
        bench_quality.main(["--quick", "--out", str(out), "--only", "glyphs", *words])
        return done.copy()

    monkeypatch.setattr(bench_quality, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        start()
    learned, others = list(CONTENDERS)[:3], list(CONTENDERS)[3:]
    assert "Celo: skipped, no celo.safetensors given: --weights FOLDER" in capsys.readouterr().err
    assert done == others[:3]
    assert [run["name"] for run in json.loads(out.read_text())["runs"]] == done
    assert list(tmp_path.iterdir()) == [out]
    until = 99
    assert start("--table") == []
    assert start(others[5]) == [others[5]]  # --only
    assert start() == [others[3], others[4], *others[6:]]
    given = ("--weights", str(weights_in(tmp_path, 0)))
    assert start(*given) == learned
    assert start(*given) == []
    weights_in(tmp_path, 1)
    assert start(*given) == learned
    assert len(json.loads(out.read_text())["runs"]) == len(CONTENDERS)


def test_a_run_that_diverges_is_recorded_as_one() -> None:
    run = Run(IMAGES, "AdamW 1e30", {"optimizer": "adamw", "lr": 1e30}, 0)
    record = bench_quality.measure(run, None)
    assert record["diverged_at"] == 1
    assert record["val_loss"] == {}
    others = [
        {**record, "seed": 1, "diverged_at": None, "val_loss": {"4": 2.0}, "cpu_s": {"4": 1.0}}
    ]
    row = quality.outcomes([record, *others])["AdamW 1e30"]
    assert math.isnan(row.loss[0])
    assert "diverged in 1 of 2" in quality.table({"AdamW 1e30": row})


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    for task in (TASKS[0], IMAGES):
        run = Run(task, "Muon 0.001", CONTENDERS["Muon 0.001"], 0)
        pupil = Pupil(task, run.options(None), muon=True)
        names = {p: name for name, p in pupil.model.named_parameters()}
        assert isinstance(pupil.optimizer, MuonAndAdamW)
        muon, *rest = pupil.optimizer.param_groups
        taken = [names[p] for p in muon["params"]]
        assert {name.split(".")[0] for name in taken} == {"blocks"}
        assert all(p.ndim == 2 for p in muon["params"])
        assert sorted(taken + [names[p] for g in rest for p in g["params"]]) == sorted(
            names.values()
        )
        assert sum(p.numel() for p in muon["params"]) > 0.4 * sum(p.numel() for p in names)


def test_means_by_hand() -> None:
    def record(name: str, seed: int, cpu_s: float, *losses: float) -> dict[str, Any]:
        steps = [str(10 * (i + 1)) for i in range(len(losses))]
        return {
            "task": "t",
            "name": name,
            "seed": seed,
            "val_loss": dict(zip(steps, losses, strict=True)),
            "cpu_s": {step: cpu_s * (i + 1) for i, step in enumerate(steps)},
            "optimizer_share": 0.25,
            "diverged_at": None,
        }

    found = quality.outcomes(
        [
            record("AdamW 0.001", 0, 1.0, 5.0, 4.0),
            record("AdamW 0.001", 1, 1.0, 5.0, 5.0),
            record("AdamW 0.01", 0, 1.0, 3.0, 1.0),  # better, of fewer seeds
            record("Celo", 0, 3.0, 4.0, 2.0),
            record("Celo", 1, 1.5, 4.0, 2.0),
        ]
    )
    assert [name for name, row in found.items() if row.is_best_rate] == ["AdamW 0.001", "Celo"]
    celo = found["Celo"]
    assert celo.loss == (2.0, 0.0)
    assert celo.apart == (-2.5, pytest.approx(math.sqrt(0.5)))
    # after 2 s: seed 0 has no validation before 3 s, seed 1 is a third of the way from 4 to 2
    assert celo.loss_at == pytest.approx((4.0 + 10 / 3) / 2)
    assert (celo.steps, celo.losses, celo.cpu_s) == ((10, 20), (4.0, 2.0), (2.25, 4.5))


def test_rates_are_searched_on_the_first_seed() -> None:
    contenders = ["Celo", "AdamW 0.1", "AdamW 0.2", "Muon 1"]
    losses: dict[str, float] = {}

    def wanted() -> set[str]:
        known = [
            {"name": name, "seed": 5, "val_loss": {"9": loss}, "diverged_at": None}
            for name, loss in losses.items()
        ]
        pairs = quality.wanted(known, contenders, (5, 6, 7))
        assert {name for name, seed in pairs if seed == 5} == set(contenders)
        later = {name for name, seed in pairs if seed == 6}
        assert later == {name for name, seed in pairs if seed == 7}
        return later

    assert wanted() == {"Celo"}
    losses["AdamW 0.1"] = 3.0
    assert wanted() == {"Celo"}
    losses |= {"AdamW 0.2": 2.0, "Muon 1": 1.0}
    assert wanted() == {"Celo", "AdamW 0.2", "Muon 1"}


def test_the_page_shows_what_the_json_holds() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())
    assert quality.report(result) in (ROOT / "docs" / "quality.md").read_text()


class Products(TorchDispatchMode):
    """Notes the dtypes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("mm", "matmul", "dot")):
            self.dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("own", [True, False])
def test_muons_products_are_the_cpus_own_or_float32s(
    own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_quality, "has_bfloat16_products", lambda: own)
    run = Run(QUICK[0], "Muon 0.001", CONTENDERS["Muon 0.001"], 0)
    pupil = Pupil(QUICK[0], run.options(None), muon=True)
    for param in pupil.model.parameters():
        param.grad = torch.ones_like(param)
    with Products() as seen:
        pupil.optimizer.step()
    assert seen.dtypes == {torch.bfloat16 if own else torch.float32}
    record = bench_quality.measure(run, None)
    assert record["bfloat16_products"] == ("own" if own else "float32")


def test_products_in_float32_are_those_of_bfloat16() -> None:
    """Where sums are exact, to the bit, rounded once; others are left alone."""
    generator = torch.Generator().manual_seed(0)
    x, y, z = torch.randint(-9, 9, (3, 40, 40), generator=generator).bfloat16()
    wanted = x @ y, torch.addmm(z, x, y, beta=2.0, alpha=3.0)
    assert float((wanted[0].float() - x.float() @ y.float()).abs().max()) > 0.0  # some are rounded
    with RoundedProducts(), Products() as seen:
        found = x @ y, torch.addmm(z, x, y, beta=2.0, alpha=3.0)
    for a, b in zip(wanted, found, strict=True):
        assert torch.equal(a, b)
        assert b.dtype is torch.bfloat16
    assert seen.dtypes == {torch.float32}


@pytest.mark.parametrize(("slower", "own"), [(1.0, True), (9.0, False)])
def test_how_fast_a_cpu_multiplies_is_measured(
    slower: float, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, multiply = [0.0], torch.mm

    def mm(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        clock[0] += slower if x.dtype is torch.bfloat16 else 1.0
        return multiply(x, y)

    monkeypatch.setattr(bench_quality.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(torch, "mm", mm)
    assert bench_quality.has_bfloat16_products.__wrapped__() == own

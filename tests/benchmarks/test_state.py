"""bench_state.py measures what it says at its smallest, its verdicts are those of the JSON, and a
mean in bfloat16 has the error of its formula.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import bench_memory
import bench_state
import pytest
import record
import run as launch_run
import state_figures
from bench_memory import HALVED, formula_of
from presets import PRESETS

ROOT = Path(__file__).parents[2]
NAME = "AdafacLO, demo"


def run_record(seed: int, loss: float, *, halved: bool) -> dict[str, Any]:
    return {
        "task": "t",
        "name": NAME + bench_state.HALVED * halved,
        "seed": seed,
        "val_loss": {"1": 9.0, "2": loss},
        "diverged_at": None,
    }


def test_the_quick_way_writes_what_the_tables_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # the built-in text takes seconds to collect, and ranks seconds to start
    monkeypatch.setattr(launch_run, "builtin_text", lambda: (bytes(range(256)),) * 2)
    monkeypatch.setattr(state_figures, "compare", computed_alone)
    rules = {name: state_figures.RULES[name] for name in ("AdafacLO", "CeloAdam")}
    monkeypatch.setattr(state_figures, "RULES", rules)
    out = tmp_path / "state.json"
    quality = ("--quality", str(tmp_path / "none.json"))
    assert bench_state.main(["--quick", *quality, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert not [key for key in record.REQUIRED if not result.get(key)]
    assert set(bench_state.PARTS) <= set(result)
    assert [run["name"] for run in result["runs"]] == [NAME, NAME + bench_state.HALVED]
    asked = [run["asked"] for run in result["runs"]]
    assert asked[1] == {**asked[0], "state_dtype": "bfloat16"}
    for row in result["updates"]["rules"].values():
        # of the first updates: no more than a few roundings of 2^-8 each, and some
        assert 0.0 < row["relative_l2"] < 4 * 2**-8, row
    assert {row["state"] for row in result["step"]["rows"]} == {"float32", "bfloat16"}
    assert bench_state.report(result) in capsys.readouterr().out

    def no_more(*_: Any) -> None:
        raise AssertionError("what is there is not done again")

    monkeypatch.setattr("bench_quality.measure", no_more)
    monkeypatch.setattr(state_figures, "means", no_more)
    assert bench_state.main(["--quick", *quality, "--out", str(out)]) == 0
    assert {name: json.loads(out.read_text())[name] for name in bench_state.PARTS} == {
        name: result[name] for name in bench_state.PARTS
    }
    other = tmp_path / "other.json"  # to which runs of the same settings count, in another file
    words = ("--quick", "--parts", "runs", "--quality", str(out), "--out", str(other))
    assert bench_state.main(words) == 0
    assert json.loads(other.read_text())["runs"] == result["runs"]


def computed_alone(
    name: str, config: Any, ranks: int, cases: list[Any], cap_mb: float, steps: int
) -> list[dict[str, Any]]:
    """In the place of bench_memory's `compare`: as if measured were computed."""
    rows = []
    for optimizer, stage in cases:
        memory = formula_of(config, optimizer, ranks=ranks, stage=stage, cap_mb=cap_mb)
        found = {"state": memory.state, "peak": memory.peak}
        rows.append(
            {
                "optimizer": optimizer,
                "ranks": ranks,
                "measured": found,
                "computed": found,
                "peak_measured_over_computed": 1.0,
            }
        )
    return rows


def test_verdicts_by_hand() -> None:
    """0.5 % of the loss or a standard deviation of the seeds, whichever is more."""

    def of(*pairs: tuple[float, float]) -> bench_state.Verdict:
        records = [
            run_record(seed, loss, halved=halved)
            for seed, pair in enumerate(pairs)
            for halved, loss in enumerate(pair)
        ]
        alone = run_record(7, 1.0, halved=True)  # a seed without its float32 run
        return bench_state.verdict([*records, alone], "t", NAME)

    close = of((2.0, 2.009), (2.0, 2.009))
    assert (close.seeds, close.allowed, close.holds) == (2, 0.01, True)
    assert close.apart[0] == pytest.approx(0.009)
    assert not of((2.0, 2.011), (2.0, 2.011)).holds
    wide = of((1.9, 2.0), (2.1, 2.2))
    assert wide.allowed == pytest.approx(math.sqrt(0.02))
    assert wide.holds
    assert not of((1.9, 2.1), (2.1, 2.3)).holds


def test_the_error_of_a_mean_is_its_formula(figures: list[str]) -> None:
    """Of 4096 elements, which know nothing of each other: their mean square is known to
    sqrt(2 / 4096) = 2.2 % or better, and the mean to an n-th of that; five standard errors.
    """
    elements = 4096
    for row in state_figures.means((0.9, 0.97), elements)["rows"]:
        assert row["error"] ** 2 == pytest.approx(
            row["formula"] ** 2, rel=5 * math.sqrt(2 / elements)
        ), row
        assert abs(row["mean_error"]) <= 5 * row["error"] / math.sqrt(elements), row
    figures.append(
        f"rounding | error of an EMA of decay {row['decay']:g} of squares in bfloat16: "
        f"{row['error']:.2%} of it, by its formula {row['formula']:.2%}"
    )


def test_a_rank_with_halved_state_needs_what_adamw_needs() -> None:
    """The must of GPT-2 355M on 8 ranks, ZeRO-2: 1.02 of fused AdamW."""
    peaks = [formula_of(PRESETS["355m"], name, ranks=8, stage=2).peak for name in (HALVED, "AdamW")]
    assert peaks[0] / peaks[1] == pytest.approx(1.0024, abs=5e-5)
    assert (HALVED, 2) in state_figures.PEAK_CASES
    assert bench_memory.formula_of is formula_of


def test_the_page_shows_what_the_json_holds() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "state.json").read_text())
    assert bench_state.report(result) in (ROOT / "docs" / "memory.md").read_text()
    cases = [(str(task), name) for task, name in bench_state.CASES]
    assert all(bench_state.verdict(result["runs"], *case).holds for case in cases)

"""The benchmarks run, say where their figures come from, and are drawn; their models count what
really happens.

Background: a benchmark that nobody runs is broken on the day it is needed, and a scaling model that
is compared with nothing says what its author hoped. So every `main` runs here at its smallest
setting (what needs ranks was measured once, in one run of two processes and one of a single one,
and is handed to it), and the model's bytes are those that these runs gave their collectives.
"""

from __future__ import annotations

import gc
import importlib
import io
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bench_builds
import bench_checkpoint
import bench_host
import bench_memory
import bench_passes
import bench_quality
import bench_train
import plots
import pytest
import record
import run as launch_run
import scaling
import seed_figures
import sharded_step
import step_model
import torch
import torch.distributed as dist
from bench_step import transformer
from matplotlib.text import Text
from safetensors.torch import save_file
from trainees import TINY

from pylo_dist import random_weights
from pylo_dist.adapters.zero.buckets import ALIGNMENT
from pylo_dist.adapters.zero.gathering import PendingParameter
from pylo_dist.checkpoint.files import DIGESTS
from support.ranks import run_ranks

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
CAP_MB = 0.02  # several buckets of the tiny model
TRAIN = bench_train.Settings(
    "tiny", (64,), 1, 1, CAP_MB, (*bench_train.BASELINES, ("AdafacLO", "zero1"), ("VeLO", "fsdp2"))
)
SCALING = scaling.Settings("tiny", 64, 1, 1, CAP_MB, sizes=(1 << 12, 1 << 16))
SHARDED = sharded_step.Settings(16, 1, 2)
LAYOUTS = [
    (layout, optimizer)
    for layout in ("ddp", "zero2", "fsdp2")
    for optimizer in ("AdafacLO", "AdamW")
]


class SettledProfile(torch.profiler.profile):
    """Refuses to stop before all gathers have arrived: threads that record on crashed one run in
    ten on a busy machine.
    """

    def __exit__(self, *error: Any) -> None:
        on_their_way = [thing for thing in gc.get_objects() if type(thing) is PendingParameter]
        super().__exit__(*error)
        assert not on_their_way


def _measure(rank: int, world: int) -> dict[str, Any]:
    """All that the benchmarks measure on ranks, by the name of what measures it."""
    found: dict[str, Any] = {"scaling": None}
    bench_memory.profile = SettledProfile
    if world > 1:
        found["measure_cases"] = bench_memory.measure_cases(
            rank, world, TINY, bench_memory.CASES, CAP_MB, 2
        )
        found["measure_layouts"] = bench_memory.measure_layouts(rank, world, TINY, LAYOUTS, CAP_MB)
        found["sharded"] = sharded_step.measure_runs(rank, world, [SHARDED])
        found["train"] = bench_train.measure_rank(rank, world, TRAIN)
    found["scaling"] = scaling.measure_rank(rank, world, SCALING)
    return found


@pytest.fixture(scope="module")
def measured() -> dict[int, list[dict[str, Any]]]:
    return {world: run_ranks(world, _measure) for world in (1, 2)}


def _run(main: Callable[[], int], monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *words])
    assert main() == 0


def test_benchmarks_write_what_plots_draw(
    measured: dict[int, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def serve(name: str) -> Callable[..., Iterator[tuple[int, list[Any]]]]:
        def on_ranks(worlds: list[int], *_: Any) -> Iterator[tuple[int, list[Any]]]:
            return ((world, [found[name] for found in measured[world]]) for world in worlds)

        return on_ranks

    for module, name in ((bench_train, "train"), (scaling, "scaling"), (seed_figures, "sharded")):
        monkeypatch.setattr(module, "on_ranks", serve(name))
    monkeypatch.setattr(
        bench_memory,
        "run_ranks",
        lambda world, fn, *_: [found[fn.__name__] for found in measured[world]],
    )
    monkeypatch.setattr(bench_memory, "SMALL", TINY)
    monkeypatch.setattr(bench_memory, "LAYOUT_CASES", LAYOUTS)
    monkeypatch.setattr(bench_train, "CONTENDERS", TRAIN.contenders)
    # of the goal's own model, which takes seconds
    monkeypatch.setattr(
        bench_train, "seconds_per_token", lambda config, tokens, device, repeats: 1e-3
    )
    monkeypatch.setattr(seed_figures, "GPT2", {"124m": (64, 2)})

    out = {
        name: tmp_path / name
        for name in (
            *("train.json", "scaling.json", "seed_figures_cpu.json", "memory.json"),
            "quality.json",
        )
    }
    _run(
        bench_train.main,
        monkeypatch,
        "--quick",
        "--preset",
        "tiny",
        "--tokens",
        "64",
        "--out",
        str(out["train.json"]),
    )
    words = (
        "--preset",
        "tiny",
        "--ranks",
        "1",
        "2",
        "--tokens",
        "64",
        "--bucket-cap-mb",
        str(CAP_MB),
        "--models",
        "124m",
    )
    _run(
        scaling.main,
        monkeypatch,
        *words,
        "--parts",
        str(out["train.json"]),
        "--out",
        str(out["scaling.json"]),
    )
    words = (
        "--rounds",
        "1",
        "--blocks",
        "1",
        "--batches",
        "1",
        "--width",
        "16",
        "--sharded-blocks",
        "1",
        "--ranks",
        "2",
    )
    _run(
        seed_figures.main,
        monkeypatch,
        *words,
        "--device",
        "cpu",
        "--out",
        str(out["seed_figures_cpu.json"]),
    )
    _run(
        bench_memory.main,
        monkeypatch,
        "--quick",
        "--layout-ranks",
        "2",
        "--out",
        str(out["memory.json"]),
    )
    for name in ("celo", "celo2"):
        save_file(dict(random_weights(name).tensors), tmp_path / f"{name}.safetensors")
    # the built-in text takes seconds to collect
    monkeypatch.setattr(launch_run, "builtin_text", lambda: (bytes(range(256)),) * 2)
    _run(
        bench_quality.main,
        monkeypatch,
        "--quick",
        "--weights",
        str(tmp_path),
        "--out",
        str(out["quality.json"]),
    )

    results = {name: json.loads(path.read_text()) for name, path in out.items()}
    for name, result in results.items():
        assert not [key for key in record.REQUIRED if not result.get(key)], name
        assert {"cpu", "cores"} <= set(result["hardware"]), name
        assert {"python", "torch", "numpy"} <= set(result["versions"]), name
    goal = results["train.json"]["goal"]
    assert goal["computed"]
    assert goal["wanted"] == 0.97
    # no learned step is as cheap as AdamW's
    assert all(0 < ratio < 1 for ratio in goal["ratio"].values()), goal
    ahead = results["scaling.json"]["predictions"]
    assert all(row["predicted"] for row in (*ahead["exchange"], *ahead["steps"]))
    assert {row["ranks"] for row in ahead["steps"]} == {8, 64, 512}
    rows = results["seed_figures_cpu.json"]["layer"]["rows"]
    assert (
        rows["small_fc, compiled passes"]["launches"] <= rows["small_fc, plain PyTorch"]["launches"]
    )
    jax = results["seed_figures_cpu.json"]["jax"]
    # float32 rounding, or the two did not do the same work: other weights or a feature more is of
    # the size of an update
    assert "absent" in jax or jax["largest_difference_from_ours"] <= 1e-3 * jax["largest_update"], (
        jax
    )

    runs = results["quality.json"]["runs"]
    assert [run["name"] for run in runs] == 2 * list(bench_quality.CONTENDERS)
    assert all(math.isfinite(loss) for run in runs for loss in run["val_loss"].values())
    for task in results["quality.json"]["tasks"]:  # one model, one first batch
        assert len({run["train_loss"]["1"] for run in runs if run["task"] == task}) == 1
    assert "skipped" not in capsys.readouterr().err

    assert plots.draw(tmp_path, tmp_path / "plots") == []
    drawn = {path.name: path.read_text() for path in (tmp_path / "plots").iterdir()}
    assert set(drawn) == set(plots.PLOTS)
    for name, svg in drawn.items():
        assert results["train.json"]["commit"][:10] in svg, name
    assert "PREDICTED" in drawn["scaling.svg"]
    assert "COMPUTED" not in drawn["training.svg"]  # it shows what was run
    assert plots.draw(tmp_path / "nothing", tmp_path / "plots") == list(plots.PLOTS)
    runs = results["seed_figures_cpu.json"]["sharded"]["runs"]
    # PyLO's, which is not to be drawn
    runs.append({**runs[-1], "parameters": runs[-1]["parameters"] // 8, "contenders": {}})
    out["seed_figures_cpu.json"].write_text(json.dumps(results["seed_figures_cpu.json"]))
    plots.draw(tmp_path, tmp_path / "plots")
    assert (tmp_path / "plots" / "seed_figures.svg").read_text() == drawn["seed_figures.svg"]


def luminance(colour: str) -> float:
    """Of #rrggbb, as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_pictures_of_the_documents_are_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On white and on a dark page; no text lies on another, or is cut."""
    boxes: dict[Text, Any] = {}
    draw = Text.draw

    def recorded(text: Text, renderer: Any) -> None:
        draw(text, renderer)
        if text.get_visible() and text.get_text():
            boxes[text] = text.get_window_extent(renderer).padded(-1)

    monkeypatch.setattr(Text, "draw", recorded)
    drawn = dict(plots.figures(record.RESULTS))
    assert set(drawn) == set(plots.PLOTS)
    for name, figure in drawn.items():
        boxes.clear()
        figure.savefig(tmp_path / name, dpi=figure.dpi)
        pairs = itertools.combinations(boxes.items(), 2)
        crossed = [(one, two) for (one, a), (two, b) in pairs if a.overlaps(b)]
        assert crossed == [], name
        width = figure.bbox.x1
        assert [text for text, box in boxes.items() if box.x0 < 0 or box.x1 > width] == [], name
        svg = (tmp_path / name).read_text()
        assert "fill: #ffffff" not in svg, name  # a background
        inks = set(re.findall(r"<text[^>]*fill: (#[0-9a-f]{6})", svg))
        assert len(re.findall("<text", svg)) == len(re.findall("<text[^>]*fill: #", svg)), name
        for ink in inks:
            for page in ("#ffffff", "#0d1117"):
                dark, light = sorted((luminance(ink), luminance(page)))
                assert (light + 0.05) / (dark + 0.05) >= 3, (name, ink, page)


def test_modelled_bytes_are_those_of_a_real_run(measured: dict[int, list[dict[str, Any]]]) -> None:
    shapes = bench_memory.shapes_of(TINY)
    for world, per_rank in measured.items():
        for optimizer in SCALING.optimizers:
            moved = step_model.zero_bytes(shapes, optimizer, world, CAP_MB)
            assert len(moved.scatters) > 1 or world == 1  # else buckets would not be tested
            wanted = {
                "reduce-scatter": sum(moved.scatters),
                "all-gather": sum(moved.gathers),
                "small syncs": sum(moved.small),
            }
            for found in per_rank:
                counted = found["scaling"]["payload"][optimizer]
                assert {key: counted.get(key, 0) for key in wanted} == wanted, (optimizer, world)


def test_state_by_layout_is_as_promised(measured: dict[int, list[dict[str, Any]]]) -> None:
    shapes = bench_memory.shapes_of(TINY)
    for optimizer in ("AdafacLO", "AdamW"):
        whole = bench_memory.memory_formula(shapes, optimizer, ranks=1, stage=0).state
        per_rank = 0
        if optimizer == "AdafacLO":  # the row and column factors, which every rank holds
            per_rank = 12 * sum(
                sum(math.prod(s) // n for n in sorted(s)[-2:])
                for s in shapes.values()
                if len(s) > 1
            )
        for layout, copies in (("ddp", 2), ("zero2", 1), ("fsdp2", 1)):
            held = [found["measure_layouts"][f"{optimizer}, {layout}"] for found in measured[2]]
            wanted = whole * copies if copies == 2 else whole + per_rank
            assert sum(h.state for h in held) == wanted, (optimizer, layout)
            assert all(h.peak > h.parameters + h.state for h in held), (optimizer, layout)


def test_every_way_to_deal_the_work_gives_the_same_parameters(
    measured: dict[int, list[dict[str, Any]]],
) -> None:
    for found in measured[2]:
        differences = found["sharded"][0]["differences"]
        assert {"AdafacLO, ours", "VeLO, ours", "AdafacLO, whole tensors by shape"} <= set(
            differences
        )
        assert max(differences.values()) == 0.0, differences
    elements = [found["sharded"][0]["elements"] for found in measured[2]]
    total = elements[0]["AdafacLO, replicated"]
    for name in (
        "AdafacLO, ours",
        "AdafacLO, whole tensors by shape",
        "AdafacLO, torch ZeroRedundancyOptimizer",
    ):
        assert sum(e[name] for e in elements) == total, name
    assert max(e["AdafacLO, ours"] for e in elements) <= total / 2 + ALIGNMENT


def test_pylo_has_a_run_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of the tensors, beside ours; its source is not needed to know that."""
    monkeypatch.setattr(sharded_step, "pylo_makers", lambda folder: {"small_fc": folder})
    whole = sharded_step.Settings(256, 4, 7, dion="dion")
    small = whole.beside_pylo("pylo")
    ratio = sum(math.prod(s) for s in small.shapes()) / sum(math.prod(s) for s in whole.shapes())
    assert 1 / 9 < ratio < 1 / 7
    found, absent = sharded_step.makers(small, torch.device("cpu"))
    ours = [f"{name}, {how}" for name in ("AdafacLO", "VeLO") for how in ("replicated", "ours")]
    assert (list(found), absent) == ([*ours, "small_fc, PyLO naive, replicated"], {})
    found, absent = sharded_step.makers(whole, torch.device("cpu"))
    assert not any("PyLO" in name for name in found)
    assert [name for name in absent if "PyLO" in name] == [
        "small_fc and velo, PyLO naive, replicated"
    ]


@pytest.mark.parametrize(
    ("width", "blocks", "by_shape", "largest_first"),
    [(768, 12, 3.44, 2.48), (1024, 24, 2.04, 1.16), (1600, 48, 1.37, 1.00)],
)
def test_balance_of_whole_tensors_on_8_ranks(
    width: int, blocks: int, by_shape: float, largest_first: float
) -> None:
    shapes = transformer(width, blocks, 1024, 50257)
    owners = sharded_step.deal_by_shape(shapes, 8)
    assert owners[:1] == [0]  # the embedding, alone of its shape
    assert sharded_step.balance(shapes, owners, 8) == pytest.approx(by_shape, abs=0.005)
    assert sharded_step.balance(
        shapes, sharded_step.deal_largest_first(shapes, 8), 8
    ) == pytest.approx(largest_first, abs=0.005)


def test_vit_is_vit_b_16() -> None:
    with torch.device("meta"):
        model = seed_figures.ViT()
    assert sum(p.numel() for p in model.parameters()) == 86_567_656
    with torch.no_grad():
        assert seed_figures.ViT(48, 1, 2)(torch.zeros(2, 3, 224, 224)).shape == (2, 1000)


def test_launches_are_operators_that_do_something() -> None:
    x = torch.ones(8, 8)
    assert seed_figures.launches_on_cpu(lambda: x.view(64).t().reshape(8, 8)) == 0
    assert seed_figures.launches_on_cpu(lambda: (x + 1).mul_(2)) == 2


def test_times_by_hand() -> None:
    link, far = step_model.Link(2.0, 100.0), step_model.Link(5.0, 10.0)
    network = step_model.Network("by hand", 2, 1.0, link, far, "")
    assert network.ring(800, 1) == 0.0
    assert network.ring(800, 2) == 1 + 2 + 800 / 2 / 100
    # one hop of three crosses nodes, which sets the pace
    assert network.ring(800, 4) == 1 + (2 * 2 + 1 * 5) + 800 * 3 / 4 / 10
    assert network.tree(100, 2) == 1 + 2 * 2 + 2 * 100 / 100
    assert network.tree(100, 8) == 1 + 2 * (2 + 2 * 5) + 2 * 100 / 10
    shapes = {"weight": (64, 32), "bias": (64,)}
    numel, parts = 64 * 33, step_model.Parts(0.5, {"AdafacLO": 1e-3}, rest_s=3.0)
    times = step_model.step_times(parts, network, shapes, "AdafacLO", ranks=4, tokens=6)
    assert times.compute == 3.0
    assert times.optimizer == pytest.approx(numel / 4 * 1e-3)
    moved = step_model.zero_bytes(shapes, "AdafacLO", 4, 25.0)
    assert moved.gathers == [4 * numel]
    assert moved.scatters == [4 * numel + 4 * 4 * ALIGNMENT]
    # audits and 64 + 32 sums of g^2, five digits of five settings and their squares, whether they
    # are good, three of scaling; those of the features: two tensors, one of them below two dims
    features = step_model.FEATURES["AdafacLO"][0]
    assert moved.small == [
        8 * (2 * 5 + 64 + 32 + 2 * 5 * 5 + 1 + 3),
        8 * (features.num_sums((0, 1)) + features.num_sums(None)),
    ]
    assert times.scatter == network.ring(moved.scatters[0], 4)
    assert times.small == sum(network.tree(size, 4) for size in moved.small)
    assert times.exposed == pytest.approx(
        sum((3.0, times.optimizer, times.scatter, times.gather, times.small, 3.0))
    )
    # here the exchange takes longer than the compute it hides
    assert times.hidden == pytest.approx(times.exposed - 3.0)
    replicated = step_model.step_times(
        parts, network, shapes, "AdafacLO", ranks=4, tokens=6, layout="replicated"
    )
    assert replicated.optimizer == pytest.approx(4 * times.optimizer)
    assert replicated.small == 0.0
    assert (
        step_model.step_times(
            parts, network, shapes, "AdafacLO", ranks=4, tokens=6, layout="fsdp2"
        ).gather
        == 2 * times.gather
    )


def test_fit_finds_the_line() -> None:
    start, per_byte = step_model.fit([(size, 3e-5 + 2e-9 * size) for size in (1e3, 1e5, 1e7)])
    assert start == pytest.approx(3e-5)
    assert per_byte == pytest.approx(2e-9)


def test_goal_by_hand() -> None:
    row = scaling.allowances(["124m"], 0.97, 8, 16384)[0]
    shared, adamw, learned = (
        row[key] for key in ("forward_and_backward_ms", "adamw_step_ms", "learned_step_may_take_ms")
    )
    assert (shared + adamw) / (shared + learned) == pytest.approx(0.97, abs=1e-5)
    parameters = 8_000_000
    ratio = bench_train.goal_ratio(1e-3, 1e-7, 5e-7, 0.25, parameters)
    assert ratio == pytest.approx((16.384 + 0.1) / (16.384 + 0.5 + 0.25))


def test_results_say_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs hardware, commit"):
        record.write({"what": "figures", "versions": {}}, tmp_path / "x.json")
    assert not list(tmp_path.iterdir())
    files = list((BENCHMARKS / "results").rglob("*.json"))
    assert files
    for path in files:
        result = json.loads(path.read_text())
        assert not [key for key in record.REQUIRED if not result.get(key)], path


def test_run_all_names_flags_that_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = (BENCHMARKS / "run_all.sh").read_text()
    calls = re.findall(
        r"^ +run (\w+) \d+ (\w+\.py)(.*)$|^run (\w+) \d+ (\w+\.py)(.*)$", script, re.MULTILINE
    )
    calls = [call[:3] if call[0] else call[3:] for call in calls]
    assert {name for name, _, _ in calls} >= {
        "seed_figures",
        "train",
        "scaling",
        "memory",
        "step",
        "zero",
        "plots",
    }
    usages = {}
    for file in sorted({file for _, file, _ in calls}):
        monkeypatch.setattr(sys, "argv", [file, "--help"])
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(file.removesuffix(".py")).main()
        assert stop.value.code == 0
        usages[file] = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    for _, file, words in calls:
        missing = set(re.findall(r"--[a-z-]+", words)) - usages[file]
        assert not missing, f"{file} has no {missing}"
    for words, message in ((["--wrong"], "--wrong: wanted"), (["--out"], "--out: wanted")):
        done = subprocess.run(
            [BENCHMARKS / "run_all.sh", *words],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 2
        assert message in done.stderr


def test_what_the_host_pays_is_counted() -> None:
    """In this process; that two builds take turns the next test shows."""
    figures = bench_host.plain("AdafacLO", 10)()
    assert figures.keys() == {"step_us", "state_dict_us", "load_us", "construct_us"}
    assert min(figures.values()) > 0
    turn = bench_host.zero("AdafacLO", 8)
    try:
        figures = turn()
    finally:
        dist.destroy_process_group()
    assert 0 < figures["step_ms"] < figures["step_ms"] + figures["construct_ms"]
    assert 0 < figures["plans_mb"] < 20


def test_two_builds_are_measured_in_turns(tmp_path: Path) -> None:
    out = tmp_path / "builds.json"
    words = ["--cases", "AdafacLO plain layers", "--turns", "1", "--steps", "1"]
    result = bench_builds.main(["--other", str(ROOT), *words, "--out", str(out)])
    (row,) = result["rows"]
    assert 0.1 < row["ratio"] < 10  # the same build twice
    assert not [key for key in record.REQUIRED if not json.loads(out.read_text()).get(key)]


def test_passes_are_measured_in_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, not in two: that these are started is tested above."""
    case = ("VeLO", "baseline", "64x64")

    class Build:
        def ask(self, line: str) -> list[str]:
            monkeypatch.setattr(sys, "stdin", io.StringIO(f"{line}\n"))
            bench_passes.worker(*case)
            return capsys.readouterr().out.split("ready\n")[1].splitlines()

    @contextmanager
    def both_builds(*_: Any) -> Iterator[tuple[Build, Build]]:
        yield Build(), Build()

    monkeypatch.setattr(bench_passes.turns, "both_builds", both_builds)
    try:
        row = bench_passes.measured(case, ROOT, 1, starts=1)
    finally:
        torch.ops.pylo_dist.instruction_set("auto")
    assert row["all_ns"] == pytest.approx(row["A_ns"] + row["B_ns"] + row["C_ns"])
    assert 0.1 < row["all_ratio"] < 10  # the same build twice


def test_checkpoints_are_measured_beside_those_of_torch(tmp_path: Path) -> None:
    out, words = tmp_path / "checkpoint.json", ["--turns", "1", "--width", "32", "--layers", "1"]
    result = bench_checkpoint.main([*words, "--disk", str(tmp_path), "--out", str(out)])
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert not [key for key in record.REQUIRED if not json.loads(out.read_text()).get(key)]
    for row in result["rows"]:
        assert row["digest"] in DIGESTS
        for what in ("save", "load"):
            ours, torchs = (row[f"{by}{what}_mb_per_cpu_s"] for by in ("", "dcp_"))
            assert ours > 0
            assert row[f"{what}_ratio"] == pytest.approx(ours / torchs, rel=0.1)

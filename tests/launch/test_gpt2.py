"""The training command: what it writes, what it refuses, and that batches may be cut in any way."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import environment
import gpt2
import pytest
import run
from options import DEFAULTS, command_for_more_ranks, parse

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "gpt2.py"
SMALL = [
    "--preset",
    "nano",
    "--optimizer",
    "adamw",
    "--threads",
    "1",
    "--device",
    "cpu",
    "--batch-size",
    "8",
]


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tokens_folder: Path
) -> tuple[Path, list[str]]:
    """The folder and the command of one finished run."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    command = [
        *SMALL,
        "--data",
        str(tokens_folder),
        "--steps",
        "60",
        "--eval-every",
        "25",
        "--lr",
        "3e-3",
    ]
    command += ["--out", str(out), "--tensorboard", "--schedule", "cosine", "--warmup", "5"]
    assert gpt2.main(command) == 0
    return out, command


def test_a_run_learns_and_says_so(trained: tuple[Path, list[str]]) -> None:
    out, _ = trained
    rows = rows_of(out)
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert [row["step"] for row in rows if "val_loss" in row] == [25, 50, 60]
    assert rows[0]["loss"] > 5  # ln 256 = 5.5 before it learns
    # The words alone, drawn evenly, cost ln 6 nats per 4.2 bytes; letter frequencies cost 2.1.
    assert rows[-1]["val_loss"] < 2.0
    for row in rows:
        assert set(row) - {"val_loss"} == {
            "step",
            "loss",
            "tokens_per_s",
            "step_ms",
            "optimizer_ms",
            "lr",
        }
        assert 0 < row["optimizer_ms"] < row["step_ms"]
        assert row["tokens_per_s"] == pytest.approx(8 * 64 / row["step_ms"] * 1e3)
    assert [row["lr"] for row in rows[:5]] == pytest.approx([3e-3 * n / 5 for n in range(1, 6)])
    assert rows[-1]["lr"] == pytest.approx(3e-4)


def test_a_run_leaves_its_files(trained: tuple[Path, list[str]]) -> None:
    out, command = trained
    config = json.loads((out / "config.json").read_text())
    assert config["command"] == command
    assert (config["world_size"], config["batch_size"], config["accumulation"]) == (1, 8, 1)
    assert (config["num_parameters"], config["weights"], config["block_size"]) == (
        120_576,
        None,
        64,
    )
    assert set(config["versions"]) == {"python", "torch", "numpy", "pylo_dist"}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "sample.txt").read_bytes()) > 100
    assert list((out / "tensorboard").glob("events*"))


def test_the_same_command_gives_the_same_losses(
    trained: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, command = trained
    again = [word.replace(str(out), str(tmp_path / "again")) for word in command]
    assert gpt2.main(again) == 0
    assert [row["loss"] for row in rows_of(tmp_path / "again")] == [
        row["loss"] for row in rows_of(out)
    ]
    told = capsys.readouterr()
    assert "torchrun --nproc_per_node=2" in told.out
    assert "nats per byte" in told.out
    assert "step 60/60  loss" in told.err  # plain lines where stderr is no terminal


def curve(out: Path, tokens: Path, *extra: str) -> list[float]:
    """The training losses of 12 steps, and the validation loss at their end."""
    command = [
        *SMALL,
        "--data",
        str(tokens),
        "--steps",
        "12",
        "--eval-every",
        "12",
        "--out",
        str(out),
    ]
    assert gpt2.main([*command, *extra]) == 0
    rows = rows_of(out)
    return [*(row["loss"] for row in rows), rows[-1]["val_loss"]]


def test_beside_it_adamw_sees_the_same_samples(
    tokens_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = []
    monkeypatch.setattr(run.picture, "figure_of", lambda rows, **words: drawn.append(words))
    alone = curve(tmp_path / "adamw", tokens_folder, "--schedule", "cosine")
    learned = ["--optimizer", "adafaclo", "--weights", "demo", "--weight-decay", "1e-4"]
    learned += ["--max-grad-norm", "9", "--clip", "per_tensor", "--schedule", "cosine"]
    out, command = tmp_path / "both", [*learned, "--beside", "adamw", "--save-every", "12"]
    both = curve(out, tokens_folder, *command)
    rows = rows_of(out / "beside")
    assert [*(row["loss"] for row in rows), rows[-1]["val_loss"]] == alone
    assert both[0] == alone[0]  # one model, before either has learned
    assert both[1] != alone[1]
    assert json.loads((out / "beside" / "config.json").read_text())["optimizer"] == "adamw"
    last = drawn[-1]["beside"]
    assert (last.name, last.lr, len(last.rows)) == ("adamw", 1e-3, 12)
    assert f"beside it   validation {alone[-1]:.4f} of adamw, lr 0.001" in capsys.readouterr().out

    # Both are done: nothing is trained again. Killed while AdamW trained: that is.
    before = (out / "beside" / "metrics.jsonl").read_bytes()
    assert curve(out, tokens_folder, *command, "--resume", "auto") == both
    assert (out / "beside" / "metrics.jsonl").read_bytes() == before  # with its times
    assert len(drawn[-1]["beside"].rows) == 12
    config = json.loads((out / "beside" / "config.json").read_text())
    (out / "beside" / "config.json").write_text(json.dumps({**config, "lr": 0.5}))
    assert curve(out, tokens_folder, *command, "--resume", "auto") == both
    assert (out / "beside" / "metrics.jsonl").read_bytes() != before  # of other settings
    (out / "beside" / "metrics.jsonl").write_bytes(before[: len(before) // 2])
    assert curve(out, tokens_folder, *command, "--resume", "auto") == both
    assert len(rows_of(out / "beside")) == 12

    # What goes wrong with it leaves the run as it is.
    monkeypatch.setitem(DEFAULTS, "nano", dataclasses.replace(DEFAULTS["nano"], adamw_lr=1e30))
    assert curve(tmp_path / "high", tokens_folder, *learned, "--beside", "adamw") == both
    assert "adamw beside it: the loss is" in capsys.readouterr().err
    assert curve(out, tokens_folder, *learned, "--overwrite") == both
    assert not (out / "beside" / "metrics.jsonl").exists()  # which would tell of another run
    assert drawn[-1]["beside"] is None


def test_accumulation_keeps_the_curve(tokens_folder: Path, tmp_path: Path) -> None:
    whole = curve(tmp_path / "1", tokens_folder)
    in_four = curve(tmp_path / "4", tokens_folder, "--micro-batch-size", "2")
    assert json.loads((tmp_path / "4" / "config.json").read_text())["accumulation"] == 4
    # Float32 sums in another order: 2**-24 of each gradient, which Adam's division can raise a
    # thousandfold.
    assert in_four == pytest.approx(whole, rel=0, abs=1e-4)


def test_bfloat16_stays_near_the_curve(tokens_folder: Path, tmp_path: Path) -> None:
    exact = curve(tmp_path / "32", tokens_folder)
    rounded = curve(tmp_path / "16", tokens_folder, "--dtype", "bfloat16")
    assert rounded != exact
    # 2**-9 of a loss of 5.5 for each of a few roundings.
    assert rounded == pytest.approx(exact, rel=0, abs=0.05)


def test_split_qkv_learns_alike(tokens_folder: Path, tmp_path: Path) -> None:
    fused = curve(tmp_path / "fused", tokens_folder)
    split = curve(tmp_path / "split", tokens_folder, "--qkv", "split")
    # The same function of weights that may be drawn in another order: the same course, give or take
    # the draw.
    assert split == pytest.approx(fused, rel=0, abs=0.2)
    assert json.loads((tmp_path / "split" / "config.json").read_text())["qkv"] == "split"


def test_builtin_text_is_the_default(tmp_path: Path) -> None:
    command = [*SMALL, "--steps", "2", "--eval-every", "2", "--eval-batches", "1"]
    assert gpt2.main([*command, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train_tokens"] > 1_000_000
    assert all(3 < row["loss"] < 7 for row in rows_of(tmp_path / "run"))


def bad_inputs(
    tokens: Path, weights: dict[str, Path], tmp: Path
) -> dict[str, tuple[list[str], str]]:
    """Arguments and the words that the message must hold."""
    (tmp / "corrupt.bin").write_bytes((tokens / "train.bin").read_bytes()[:-2])
    (tmp / "used").mkdir()
    (tmp / "used" / "notes.txt").write_text("mine")
    (tmp / "empty").mkdir()
    (tmp / "file").write_text("")
    data = ["--data", str(tokens)]
    one_file = ["--data", str(tokens / "train.bin")]
    return {
        "missing data": (["--data", str(tmp / "gone.bin"), "--eval-every", "0"], "no such file"),
        "missing folder": (["--data", str(tmp / "gone")], "no such file"),
        "empty folder": (["--data", str(tmp / "empty")], "no *train*.bin"),
        "corrupt data": (
            ["--data", str(tmp / "corrupt.bin"), "--eval-every", "0"],
            "it is cut or damaged",
        ),
        "no validation": (one_file, "pass --val-data"),
        "validation alone": (["--val-data", str(tokens)], "without --data"),
        "block size": ([*data, "--block-size", "65"], "above the 64 positions of preset nano"),
        "optimizer": ([*data, "--optimizer", "sgd"], "adafaclo"),
        "preset": ([*data, "--preset", "2b"], "1.5b"),
        "vocabulary": ([*data, "--vocab-size", "100"], "token 116 found, tokens below 100 wanted"),
        "used folder": ([*data, "--out", str(tmp / "used")], "--overwrite"),
        "out is a file": ([*data, "--out", str(tmp / "file")], "is a file"),
        "micro batch": ([*data, "--micro-batch-size", "3"], "use one of 1, 2, 4, 8"),
        "steps": ([*data, "--steps", "0"], "--steps is 0"),
        "steps without end": ([*data, "--steps", f"{10**30}"], "it must be at most 1000000000"),
        "seed": ([*data, "--seed", f"{2**63}"], f"it must be at most {2**63 - 1}"),
        "timeout": ([*data, "--timeout", "10000001"], "it must be at most 10000000"),
        "lr": ([*data, "--lr", "nan"], "--lr is nan"),
        "large lr": (
            [*data, "--optimizer", "adafaclo", "--weights", "demo", "--lr", "1e30"],
            "lr=1e+30: wanted a finite number",
        ),
        "no number": ([*data, "--steps", "ten"], "--steps"),
        "unknown flag": ([*data, "--stepz", "3"], "--stepz"),
        "beside itself": ([*data, "--beside", "adamw"], "drop it, or take it back: --beside none"),
        "beside another": ([*data, "--beside", "sgd"], "--beside sgd: wanted adamw, or none"),
        "weights of adamw": ([*data, "--weights", "demo"], "adamw"),
        "demo of velo": (
            [*data, "--optimizer", "velo", "--weights", "demo"],
            "there are no demo weights for velo",
        ),
        "weights of another": (
            [*data, "--optimizer", "celo2", "--weights", str(weights["velo"])],
            "do not fit celo2",
        ),
        "plan of adamw": (
            [*data, "--num-steps", "9"],
            "--num-steps is for --optimizer celo, celo-adam or velo and means nothing to adamw",
        ),
        "plan of mulo": (
            [*data, "--optimizer", "mulo", "--num-steps", "9"],
            "--num-steps is for --optimizer celo, celo-adam or velo",
        ),
        "plan of one step": ([*data, "--optimizer", "velo", "--steps", "1"], "pass --num-steps"),
        "mup of adafaclo": (
            [*data, "--optimizer", "adafaclo", "--mup-base-width", "32"],
            "--mup-base-width is for --optimizer mulo",
        ),
        "mup heads": (
            [*data, "--optimizer", "mulo", "--mup-base-heads", "2"],
            "--mup-base-heads 2 came without --mup-base-width",
        ),
        "mup width": (
            [*data, "--optimizer", "mulo", "--mup-base-width", "30"],
            "--mup-base-width 30 is not a multiple",
        ),
        "width": ([*data, "--n-embd", "65"], "--n-embd 65 is not a multiple of --n-head 4"),
        "clip above velo's": (
            [
                *data,
                "--optimizer",
                "velo",
                "--weights",
                str(weights["velo"]),
                "--max-grad-norm",
                "2000",
            ],
            "max_grad_norm=2000.0: wanted at most 1000",
        ),
        "weights": (
            [*data, "--optimizer", "adafaclo", "--weights", str(tmp / "no")],
            str(tmp / "no"),
        ),
    }


def test_bad_input_is_one_line_and_code_2(
    tokens_folder: Path,
    learned_weights: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, (arguments, words) in bad_inputs(tokens_folder, learned_weights, tmp_path).items():
        # argparse keeps the last of a repeated flag, so a case may override the shared ones
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
        assert gpt2.main([*SMALL, *out, *arguments]) == 2, name
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, (name, lines)
        assert words in lines[0], (name, lines)
        assert not (tmp_path / "out" / "metrics.jsonl").exists(), name
    assert (tmp_path / "used" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("logger", ["wandb", "tensorboard"])
def test_a_missing_logger_is_one_line(
    logger: str,
    tokens_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, logger, None)  # makes the import fail
    command = [*SMALL, "--data", str(tokens_folder), "--out", str(tmp_path / "o"), f"--{logger}"]
    assert gpt2.main(command) == 2
    assert capsys.readouterr().err == f"gpt2.py: --{logger} needs a package: pip install {logger}\n"


def test_overwrite_replaces_a_run_and_nothing_else(tokens_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "metrics.jsonl").write_text("old\n" * 9)
    command = [
        *SMALL,
        "--data",
        str(tokens_folder),
        "--steps",
        "2",
        "--eval-every",
        "0",
        "--out",
        str(out),
    ]
    assert gpt2.main([*command, "--overwrite"]) == 0
    assert len(rows_of(out)) == 2
    assert (out / "notes.txt").read_text() == "mine"


def test_a_terminal_gets_one_redrawn_line(
    tokens_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    curve(tmp_path / "o", tokens_folder)
    err = capsys.readouterr().err
    assert err.startswith("gpt2.py: no launcher: one rank.\n")
    assert err.count("\n") == 2  # that, and tqdm's own at the end
    last = err.strip().split("\r")[-1]
    assert all(
        word in last for word in ("12/12", "loss", "val", "tokens/s", "ms/step", "optimizer")
    ), last


def test_a_diverged_run_stops_with_code_3(
    tokens_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        *SMALL,
        "--data",
        str(tokens_folder),
        "--steps",
        "40",
        "--eval-every",
        "0",
        "--lr",
        "1e30",
    ]
    assert gpt2.main([*command, "--out", str(tmp_path / "o")]) == 3
    assert "the loss is nan at step" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "o")) < 40


def start_ranks(arguments: list[str], world_size: int) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each rank, started as torchrun would but without it
    between.
    """
    # of those that outgoing connections of other tests never take
    port = environment.free_port()
    shared = os.environ | {
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    results = []
    try:
        for rank in ranks:
            out, err = rank.communicate(timeout=90)
            results.append((rank.returncode, out, err))
    finally:
        for rank in ranks:
            rank.kill()
    return results


@pytest.mark.parametrize("case", ["batch", "used folder on rank 0", "corrupt data"])
def test_bad_input_ends_every_rank(case: str, tokens_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    (tmp_path / "corrupt.bin").write_bytes(b"abc")
    extra, words = {
        "batch": (["--batch-size", "7"], "use a multiple of 2, such as 6 or 8"),
        "used folder on rank 0": (["--out", str(tmp_path / "used")], "--overwrite"),
        "corrupt data": (
            ["--data", str(tmp_path / "corrupt.bin"), "--eval-every", "0"],
            "3 bytes found",
        ),
    }[case]
    arguments = [*SMALL, "--data", str(tokens_folder), "--out", str(tmp_path / "out"), *extra]
    (code0, _, err0), (code1, _, err1) = start_ranks(arguments, world_size=2)
    assert (code0, code1) == (2, 2)
    assert len(err0.splitlines()) == 1, err0
    assert words in err0
    assert err1 == ""


def test_defaults_fit_their_presets() -> None:
    for preset, defaults in DEFAULTS.items():
        options = parse(["--preset", preset, "--optimizer", "adamw"])
        assert options.base_lr() == defaults.adamw_lr
        for world_size in (1, 2, 4, 8):
            plan = options.plan(world_size)
            assert plan.micro_batch <= defaults.micro_batch_size
    assert parse([]).base_lr() == 1.0
    assert parse(["--preset", "124m"]).plan(8).accumulation == 4


def test_the_command_for_more_ranks_drops_what_belongs_to_this_run() -> None:
    argv = [
        "--preset",
        "nano",
        "--out",
        "x",
        "--overwrite",
        "--micro-batch-size=12",
        "--resume",
        "auto",
        "--batch-size",
        "12",
    ]
    told = command_for_more_ranks(argv, parse(argv).plan(1))
    assert told.startswith("torchrun --nproc_per_node=2 ")
    assert told.endswith("gpt2.py --preset nano --batch-size 12")

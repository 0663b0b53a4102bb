"""gpt2.py under DeepSpeed follows the run without it, on other ranks too, under three launchers;
and the Trainer's example.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import gpt2
import pytest
from environment import free_port

pytest.importorskip(
    "deepspeed", reason="DeepSpeed is not installed: launch/setup.sh launch,dev,deepspeed"
)

ROOT = Path(__file__).resolve().parents[2]
JSONS = ROOT / "launch" / "deepspeed"
STEPS, HALF = 10, 5
COMMON = [
    "--preset",
    "nano",
    "--batch-size",
    "12",
    "--micro-batch-size",
    "2",
    "--block-size",
    "16",
    "--eval-every",
    "0",
]
COMMON += ["--device", "cpu", "--threads", "1"]
RUN = [*COMMON, "--weights", "demo", "--steps", str(STEPS)]


def launch(launcher: list[str], words: list[str], script: str = "gpt2.py") -> str:
    """Run a script of launch/ and return what it printed."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    command = [*launcher, str(ROOT / "launch" / script), *words]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, errors="replace", timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def torchrun(num_ranks: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={num_ranks}",
    ]


def losses(folder: Path) -> list[float]:
    return [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def worst(folder: Path, other: Path) -> float:
    a, b = losses(folder), losses(other)
    assert len(a) == len(b) == STEPS
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def test_the_curve_is_that_of_zero_and_goes_on_elsewhere(
    tmp_path: Path, figures: list[str]
) -> None:
    zero, three = tmp_path / "zero", tmp_path / "ds3"
    zero_2 = ["--parallel", "zero2"]
    assert gpt2.main([*RUN, *zero_2, "--out", str(zero)]) == 0  # in one process
    stage_3 = ["--deepspeed", str(JSONS / "zero3.json")]
    printed = launch(torchrun(2), [*RUN, *stage_3, "--save-every", str(HALF), "--out", str(three)])
    assert "2 rank(s)" in printed
    assert (
        "DeepSpeed stage 3 (DeepSpeedZeroOptimizer_Stage3)" in (three / "optimizer.txt").read_text()
    )
    # The same samples; sums over ranks round in another order. 1e-4 of a loss is what a reader
    # cannot see.
    apart = {"stage 3 on 2 ranks": worst(three, zero)}
    assert losses(zero)[-1] < losses(zero)[0] - 0.2  # a curve of learning
    half = ["--resume", str(three / "checkpoints" / f"step-{HALF:08d}")]
    one, ours = tmp_path / "ds2", tmp_path / "again"
    stage_2 = ["--deepspeed", str(JSONS / "zero2.json")]
    launch([sys.executable], [*RUN, *stage_2, *half, "--out", str(one)])
    apart["stage 2 on 1 rank"] = worst(one, zero)
    assert gpt2.main([*RUN, *zero_2, *half, "--out", str(ours)]) == 0
    apart["ZeroOptimizer, stage 2, on 1 rank"] = worst(ours, zero)
    assert max(apart.values()) <= 1e-4, apart
    figures += [
        f"DeepSpeed launch | {name} | {STEPS} steps: {value:.1e} nats from --parallel zero2"
        for name, value in apart.items()
    ]


# What the README says, and a loop; ends as scripts do.
USERS = """
import json, sys
import torch, deepspeed
import pylo_dist.deepspeed

for stage in range(4):
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}}
    config["optimizer"] = {"type": "AdafacLO", "params": {"weights": "demo"}}
    path = f"{sys.argv[1]}/zero{stage}.json"
    with open(path, "w") as file:
        json.dump(config, file)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=path
    )
    generator = torch.Generator().manual_seed(1 + engine.global_rank)
    x, y = (torch.randn(4, size, generator=generator).to(engine.device) for size in (16, 4))
    losses = []
    for _ in range(5):
        loss = (engine(x) - y).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    with open(f"{sys.argv[1]}/{stage}.{engine.global_rank}.json", "w") as file:
        json.dump(losses, file)
torch.distributed.destroy_process_group()  # left to the interpreter, its threads may abort the exit
"""


def test_a_script_of_a_users_own(tmp_path: Path) -> None:
    script, cache = tmp_path / "mine.py", tmp_path / "extensions"
    script.write_text(USERS)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # as one leaves it who interrupts DeepSpeed's first run on a CPU: later ones wait for ever
    env["TORCH_EXTENSIONS_DIR"] = str(cache)
    (cache / "deepspeed_shm_comm").mkdir(parents=True)
    (cache / "deepspeed_shm_comm" / "lock").touch()
    for name in ("DS_ACCELERATOR", "DS_BUILD_OPS"):
        env.pop(name, None)
    done = subprocess.run(
        [*torchrun(2), str(script), str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        found = [json.loads((tmp_path / f"{stage}.{rank}.json").read_text()) for stage in range(4)]
        assert found[0][-1] < found[0][0]
        for losses in found[1:]:  # sums of two ranks, in another order
            assert losses == pytest.approx(found[0], rel=1e-5)
    assert not list(cache.rglob("*.o"))


def test_deepspeeds_own_launcher(tmp_path: Path, learned_weights: dict[str, Path]) -> None:
    words = [
        *COMMON,
        "--optimizer",
        "velo",
        "--weights",
        str(learned_weights["velo"]),
        "--steps",
        "3",
    ]
    command = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
    ]
    printed = launch(
        command, [*words, "--deepspeed", str(JSONS / "zero1.json"), "--out", str(tmp_path / "run")]
    )
    assert "2 rank(s)" in printed
    assert len(losses(tmp_path / "run")) == 3


def test_mpirun_in_bfloat16(tmp_path: Path) -> None:
    if shutil.which("mpirun") is None:
        pytest.skip("there is no mpirun: apt-get install openmpi-bin libopenmpi-dev")
    if find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed: launch/setup.sh launch,dev,deepspeed,mpi")
    command = ["mpirun", "--oversubscribe", "-np", "2", sys.executable]
    if os.geteuid() == 0:
        command.insert(1, "--allow-run-as-root")
    words = [
        *RUN[:-1],
        "3",
        "--deepspeed",
        str(JSONS / "zero2_bf16.json"),
        "--out",
        str(tmp_path / "run"),
    ]
    assert "2 rank(s)" in launch(command, words)
    found = losses(tmp_path / "run")
    assert len(found) == 3
    assert found[2] < found[0]


def test_the_trainers_example(tmp_path: Path) -> None:
    pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install transformers accelerate"
    )
    pytest.importorskip(
        "accelerate", reason="accelerate is not installed: pip install transformers accelerate"
    )
    config = json.loads((JSONS / "trainer.json").read_text())
    config["zero_optimization"]["stage"] = 3
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps(config))
    printed = launch(
        torchrun(2),
        ["--deepspeed", str(path), "--steps", "10", "--out", str(tmp_path / "out")],
        "trainer.py",
    )
    assert "AdafacLO, weights demo" in printed
    assert "gradient_clipping 1 by DeepSpeed, none by pylo_dist" in printed
    assert re.search(
        r"transformer\.h\.0\.attn\.c_attn\.weight +\(64, 192\) +0 +6,144 +small_fc", printed
    )
    found = [float(x) for x in re.findall(r"'loss': '?([0-9.]+)", printed)]
    assert len(found) == 2
    assert found[1] < found[0] < 6.0


def test_wrong_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice, broken = tmp_path / "twice.json", tmp_path / "broken.json"
    twice.write_text(json.dumps({"optimizer": {"type": "VeLO"}}))
    broken.write_text("{")
    for words, said in (
        (["--deepspeed", str(twice)], 'holds "optimizer", which follows from --optimizer'),
        (["--deepspeed", str(broken)], "cannot be read"),
        (["--deepspeed", str(tmp_path / "none.json")], "cannot be read"),
        (["--deepspeed", str(JSONS / "zero2.json"), "--optimizer", "adamw"], "adamw is none"),
        (
            ["--deepspeed", str(JSONS / "zero2.json"), "--parallel", "ddp"],
            "--parallel ddp came with --deepspeed",
        ),
        (
            ["--deepspeed", str(JSONS / "zero2.json"), "--dtype", "bfloat16"],
            '"bf16": {"enabled": true}',
        ),
    ):
        weights = [] if "adamw" in words else ["--weights", "demo"]
        assert gpt2.main([*COMMON, *weights, *words, "--out", str(tmp_path / "out")]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("gpt2.py: ")
        assert said in line

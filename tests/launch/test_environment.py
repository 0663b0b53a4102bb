"""What started a process is found or refused by name; and under every launcher the same command
follows the same curve.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import environment
import gpt2
import pytest
from checkpoints import published_in
from environment import (
    Environment,
    find,
    first_host,
    free_port,
    is_first_here,
    rank_named,
    tasks_per_node,
)
from options import WrongInput, parse
from place import Place

from support.launchers import mpirun, wait_for_rows

ROOT = Path(__file__).resolve().parents[2]
BY_HAND = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
TORCHRUN = {**BY_HAND, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
STEP = {  # of one srun with four tasks on two nodes
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


def test_what_is_found() -> None:
    alone = Environment("no launcher")
    # a batch script by itself
    assert (
        find({}) == find({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}) == alone
    )
    assert str(alone) == "no launcher: one rank"
    by_torchrun = Environment("torchrun", 1, 4, 1, 2, "node1", 29500)
    # torchrun's ranks may lie under one task of srun, or one process of mpirun, for each machine
    batch = {
        **STEP,
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "0",
    }
    assert find(TORCHRUN) == find(TORCHRUN | batch) == by_torchrun
    assert (
        str(by_torchrun)
        == "torchrun: rank 1 of 4, 1 of 2 on this machine; they meet at node1:29500"
    )
    # by hand: in a batch script, in a shell of a step of one task, under mpirun -np 1
    by_hand = Environment("RANK and WORLD_SIZE", 1, 4, None, None, "node1", 29500)
    assert str(by_hand) == "RANK and WORLD_SIZE: rank 1 of 4; they meet at node1:29500"
    for around in (
        {},
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        {"PMI_SIZE": "1"},
    ):
        assert find(BY_HAND | around) == by_hand
    assert find({"WORLD_SIZE": "1", "LOCAL_RANK": "3"}).local_rank == 3
    # a script that has set WORLD_SIZE alone, before srun
    assert find(STEP | {"WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "5"}) == Environment(
        "srun", 3, 4, 1, 2, "a", 5
    )
    assert (
        find(BY_HAND | {"CROSS_SIZE": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).launcher
        == "DeepSpeed's launcher"
    )
    assert find({"WORLD_SIZE": "1"}).world_size == 1
    found = find(STEP)
    assert found == Environment("srun", 3, 4, 1, 2, "gpu07", found.port)
    assert (
        find(STEP | {"SLURM_PROCID": "0"}).port
        == found.port
        != find(STEP | {"SLURM_STEP_ID": "2"}).port
    )
    given = find(STEP | {"MASTER_ADDR": "a", "MASTER_PORT": "5", "PMI_SIZE": "4", "PMI_RANK": "3"})
    assert (given.launcher, given.address, given.port) == ("srun", "a", 5)
    assert find(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) == Environment("srun")
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    lists = {
        "gpu[003-010,12],login1": "gpu003",
        "a1,b2": "a1",
        "one": "one",
        "rack2-[7,9]-ib": "rack2-7-ib",
    }
    lists |= {"rack[0-3]_blade[0-41]": "rack0_blade0", "a[1-2]b[3-4]c,d": "a1b3c"}
    assert {nodes: first_host(nodes) for nodes in lists} == lists
    places = (
        {},
        BY_HAND,
        {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
        STEP,
        {"SLURM_PROCID": "1"},
    )
    assert [(rank_named(v), is_first_here(v)) for v in places] == [
        *(("0", True), ("1", True), ("2", False), ("3", False), ("0", True))
    ]
    assert free_port() in environment.PORTS


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            without(BY_HAND, "MASTER_ADDR", "MASTER_PORT"),
            "WORLD_SIZE is 4 without MASTER_ADDR, MASTER_PORT; start .* torchrun",
        ),
        (without(BY_HAND, "WORLD_SIZE"), "RANK is 1 without WORLD_SIZE; unset it, or start"),
        (
            BY_HAND | {"RANK": "4"},
            "RANK is 4 and WORLD_SIZE 4; it must be below. Unset both, or start",
        ),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK is 1 and WORLD_SIZE 1"),
        (BY_HAND | {"RANK": "-1"}, "RANK is -1, 0 or more was wanted"),
        (BY_HAND | {"WORLD_SIZE": "four"}, "WORLD_SIZE is 'four', a number was wanted"),
        (BY_HAND | {"WORLD_SIZE": "0"}, "WORLD_SIZE is 0, 1 or more"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK is 2 and LOCAL_WORLD_SIZE 2"),
        (BY_HAND | {"MASTER_PORT": "99999"}, "MASTER_PORT is 99999, 1 to 65535 was wanted"),
        (STEP | {"MASTER_PORT": "0"}, "MASTER_PORT is 0, 1 to 65535 was wanted"),
        (
            STEP | {"WORLD_SIZE": "2"},
            "WORLD_SIZE is 2 and SLURM_STEP_NUM_TASKS 4; .* srun's are taken",
        ),
        (BY_HAND | STEP, "RANK is 1 and SLURM_PROCID 3; unset RANK and WORLD_SIZE"),
        (
            BY_HAND | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
            "WORLD_SIZE is 4 and OMPI_COMM_WORLD_SIZE 2; .* mpirun's are taken",
        ),
        (without(STEP, "SLURM_LOCALID"), "SLURM_STEP_NUM_TASKS is 4 without SLURM_LOCALID"),
        (STEP | {"SLURM_PROCID": "4"}, "SLURM_PROCID is 4 and SLURM_STEP_NUM_TASKS 4"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2x2"}, "SLURM_STEP_TASKS_PER_NODE is '2x2'"),
        (without(STEP, "SLURM_STEP_NODELIST"), "set MASTER_ADDR"),
    ],
)
def test_contradictions_are_refused_by_name(variables: dict[str, str], words: str) -> None:
    with pytest.raises(WrongInput, match=words):
        find(variables)


def test_a_contradiction_ends_a_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of each rank that is refused; what is alike on all of a machine, of its first. And the code
    is handed over.
    """
    contradiction = "WORLD_SIZE is 4 and OMPI_COMM_WORLD_SIZE 2; unset RANK"
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    missing = "WORLD_SIZE is 4 without MASTER_ADDR"
    for variables, words, wanted in (
        ({**BY_HAND, **mpi, "RANK": "0"}, [], [f"gpt2.py: {contradiction}"]),
        ({**BY_HAND, **mpi}, [], [f"gpt2.py: rank 1: {contradiction}"]),
        ({"RANK": "1"}, [], ["gpt2.py: rank 1: RANK is 1 without WORLD_SIZE"]),
        (without(TORCHRUN, "MASTER_ADDR"), [], [f"gpt2.py: rank 1: {missing}"]),
        (TORCHRUN, ["--steps", "0"], []),
        (TORCHRUN | {"LOCAL_RANK": "0"}, ["--steps", "0"], ["gpt2.py: rank 1: --steps is 0"]),
    ):
        code = tmp_path / "code"
        with monkeypatch.context() as patch:
            for name, value in {**variables, "EXIT_CODE_FILE": str(code)}.items():
                patch.setenv(name, value)
            assert gpt2.main([*words, "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == len(wanted), said
        assert all(line.startswith(start) for line, start in zip(said, wanted, strict=True)), said
        assert code.read_text() == "2\n"
        code.unlink()
    assert not (tmp_path / "out").exists()


def test_the_gpu_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    options = parse(["--device", "cuda"])

    def gpu(variables: dict[str, str], count: int) -> int | None:
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        return Place.find(options, find(variables)).device.index

    assert gpu(STEP, 2) == gpu(TORCHRUN, 2) == 1
    assert gpu(STEP, 1) == 0  # srun --gpus-per-task=1
    assert gpu(BY_HAND | {"RANK": "3"}, 1) == 0  # one GPU in each pod
    assert gpu(BY_HAND | {"RANK": "3"}, 2) == 1
    assert gpu({"WORLD_SIZE": "1", "LOCAL_RANK": "3"}, 8) == 3
    for variables, count in (
        (TORCHRUN, 1),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}, 2),
    ):
        with pytest.raises(
            WrongInput,
            match=rf"ranks on a machine with {count} CUDA device\(s\); start {count} there",
        ):
            gpu(variables, count)


def test_mpirun_without_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # makes the import fail
    with pytest.raises(WrongInput, match=r"OMPI_COMM_WORLD_SIZE is 2, .* pip install mpi4py"):
        find({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"})
    # Hydra's, under one srun for each machine
    for pmi in (
        {"PMI_SIZE": "8", "PMI_RANK": "3"},
        {"PMI_SIZE": "4", "PMI_RANK": "2"},
    ):
        with pytest.raises(
            WrongInput, match=rf"PMI_SIZE is {pmi['PMI_SIZE']}, so mpirun has started this"
        ):
            find(STEP | pmi)


# ----------------------------------------------------------------------------------- real launchers

FAKE_SRUN = """#!/usr/bin/env bash
# Runs a command once for each task of SLURM_NNODES machines, all of them this one, as srun does;
# and kills them all at SIGTERM.
while [[ $1 == -* ]]; do shift; done
export SLURM_STEP_NUM_TASKS=$SLURM_NNODES SLURM_STEP_ID=0 SLURM_LOCALID=0
export SLURM_STEP_TASKS_PER_NODE="1(x$SLURM_NNODES)"
export SLURM_STEP_NODELIST=$SLURM_JOB_NODELIST
pids=()
for ((node = 0; node < SLURM_NNODES; node++)); do
  SLURM_PROCID=$node SLURM_NODEID=$node "$@" &
  pids+=($!)
done
echo "${pids[@]}" >"$TASKS"
processes() { for pid in "${pids[@]}"; do echo "$pid"; cat "/proc/$pid/task/$pid/children"; done; }
trap 'kill -KILL $(processes)' TERM
worst=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; code=$?; done
  [ "$code" -gt "$worst" ] && worst=$code
done
exit "$worst"
"""
FAKE_SCANCEL = """#!/usr/bin/env bash
# A signal to all processes of the job's steps, torchrun and its ranks.
[ "$*" = "--signal=TERM 12" ] || exit 1
for pid in $(cat "$TASKS"); do kill -TERM "$pid" $(cat "/proc/$pid/task/$pid/children"); done
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
  "show hostnames") printf '127.0.0.1\\n127.0.0.2\\n' ;;
  "show job") echo "JobState=RUNNING Reason=None" ;;
  requeue*) echo "$2" >>"$REQUEUED" ;;
esac
"""
STEPS, SHORT = 240, 12
COMMON = [
    "--preset",
    "nano",
    "--block-size",
    "16",
    "--batch-size",
    "4",
    "--eval-every",
    "0",
    "--optimizer",
    "adafaclo",
]
COMMON += ["--weights", "demo", "--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process."""
    out = tmp_path_factory.mktemp("plain") / "run"
    assert gpt2.main([*COMMON, "--steps", str(STEPS), "--out", str(out)]) == 0
    assert (out / "DONE").read_text() == f"{STEPS} steps\n"
    return losses(out)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a job on two machines, and programs that act as SLURM's."""
    folder = tmp_path_factory.mktemp("slurm")
    for name, text in (("srun", FAKE_SRUN), ("scancel", FAKE_SCANCEL), ("scontrol", FAKE_SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    variables = {
        "SLURM_JOB_ID": "12",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    variables |= {
        "TASKS": str(folder / "tasks"),
        "REQUEUED": str(folder / "requeued"),
        "RANKS_PER_NODE": "1",
        "LOCAL_ADDR": "127.0.0.1",
        "WAIT": "0",
    }
    return {**variables, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def started(command: list[str], variables: dict[str, str]) -> subprocess.Popen[str]:
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    return subprocess.Popen(
        command,
        env=os.environ | shared | variables,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group that can get a signal
        # which a job in the background ignores
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def finished(processes: list[subprocess.Popen[str]]) -> str:
    """What processes that must end well have written to stderr."""
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)[
        -6000:
    ]
    return "".join(said)


def check_curve(out: Path, wanted: list[float], steps: int) -> None:
    found = losses(out)
    assert len(found) == steps
    # The same samples; sums over ranks round in another order. 1e-4 of a loss is what a reader
    # cannot see.
    assert max(abs(a - b) for a, b in zip(found, wanted[:steps], strict=True)) <= 1e-4
    assert found[-1] < found[0] - 0.2  # a curve of learning


def test_mpirun_follows_one_process(plain: list[float], tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = finished(
        [
            started(
                [
                    *mpirun(2),
                    sys.executable,
                    "launch/gpt2.py",
                    *COMMON,
                    "--steps",
                    str(SHORT),
                    "--out",
                    str(out),
                ],
                {},
            )
        ]
    )
    assert "gpt2.py: mpirun: rank 0 of 2, 0 of 2 on this machine; they meet at 127.0.0.1:" in said
    assert said.count("gpt2.py:") == 1  # rank 0 alone
    check_curve(out, plain, SHORT)


def test_srun_follows_one_process(
    plain: list[float], slurm: dict[str, str], tmp_path: Path
) -> None:
    direct = {**slurm, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common = [*COMMON, "--steps", str(SHORT), "--out", str(tmp_path / "run")]
    said = finished([started(["srun", sys.executable, "launch/gpt2.py", *common], direct)])
    assert "gpt2.py: srun: rank 0 of 2, 0 of 1 on this machine; they meet at 127.0.0.1:" in said
    check_curve(tmp_path / "run", plain, SHORT)


def test_a_job_on_one_machine_starts_its_ranks(slurm: dict[str, str], tmp_path: Path) -> None:
    """With a program in Python's place: the ranks of torchrun have their test below."""
    stub = tmp_path / "python"
    stub.write_text(
        f'#!/bin/sh\ncase $1 in *options.py) exec {sys.executable} "$@" ;; esac\necho "$*" '
        '>"$CALLED"\n'
    )
    stub.chmod(0o755)
    variables = {**slurm, "PYTHON": str(stub), "CALLED": str(tmp_path / "called")}
    command = ["launch/slurm/one_node.sbatch", "--out", "x", "--save-every=5"]
    said = finished([started(command, {**variables, "RANKS_PER_NODE": "3"})])
    assert "resume_loop.sh: done after 1 attempt(s)" in said
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node=3"
    assert (
        tmp_path / "called"
    ).read_text() == f"{torchrun} launch/gpt2.py --out x --save-every=5 --resume auto\n"


def test_two_agents_of_torchrun_follow_one_process(
    plain: list[float], slurm: dict[str, str], tmp_path: Path
) -> None:
    """torchrun --nnodes=2, by nodes.sbatch; which is interrupted first, saves, goes back into the
    queue and is started again.

    By Ctrl-C, which the whole group gets: SIGTERM to the script alone is less.
    """
    out = tmp_path / "run"
    command = [
        "launch/slurm/nodes.sbatch",
        *COMMON,
        "--steps",
        str(STEPS),
        "--save-every",
        "1000",
        "--out",
        str(out),
    ]
    process = started(command, {**slurm, "PORT": str(free_port())})
    try:
        wait_for_rows(out, 3)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, said[-6000:]
    (step,) = published_in(out)
    assert 3 <= step < STEPS
    assert len(losses(out)) == step  # none that is not saved
    assert Path(slurm["REQUEUED"]).read_text() == "12\n"
    said = finished([started(command, {**slurm, "PORT": str(free_port())})])
    assert "gpt2.py: torchrun: rank 0 of 2, 0 of 1 on this machine; they meet at 127.0.0.1:" in said
    assert f"goes on after step {step} from" in said
    check_curve(out, plain, STEPS)

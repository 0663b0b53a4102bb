"""The CUDA passes without a GPU: csrc/cuda.cu compiled by the C++ compiler, a GPU's threads as fibers (tests/fibers.h).

Launchers, tables, kernels and the tensor-core program are those that nvcc compiles; what is emulated is the machine.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import cuda_checks
import pytest
import torch
from test_kernels import SETTINGS, run

from pylo_dist import ops

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    path, torch_path = tmp_path_factory.mktemp("fibers") / "fibers.so", Path(torch.__file__).parent
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wno-attributes", "-U_FORTIFY_SOURCE", "-shared", "-fPIC"]
    flags += ["-DPYLO_SMALL_JOBS", "-DTORCH_TARGET_VERSION=0x020a000000000000ull"]
    include = [f"-I{folder}" for folder in (ROOT / "tests", ROOT / "csrc", ROOT / "csrc/include", torch_path / "include")]
    source = str(ROOT / "tests/fibers.cpp")
    libraries = [f"-L{torch_path / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([compiler, *flags, *include, source, "-o", str(path), *libraries], check=True)
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


class Emulated:
    """torch.ops.pylo_dist with the passes of the CUDA extension."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.pylo_dist_fibers, name)


@pytest.fixture(autouse=True)
def _emulated(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "pylo_dist", Emulated(), raising=False)
    monkeypatch.setattr(ops, "library", lambda device_type: "")


MATRICES = ("adafac", "velo_clipped", "celo2_base")  # the others: tensors of random shapes


@pytest.mark.parametrize("name", SETTINGS)
def test_errors_are_those_of_the_pytorch_path(name: str, figures: list[str]) -> None:
    own, error = cuda_checks.check_random(name, "high", "cpu", 0 if name in MATRICES else 1, 2)
    figures.append(f"CUDA passes on fibers | {name} | high: largest error {error:.1e}, PyTorch {own:.1e}")


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_other_precisions(precision: str, figures: list[str]) -> None:
    own, error = cuda_checks.check_random("adafac", precision, "cpu", 0, 3)
    figures.append(f"CUDA passes on fibers | adafac | {precision}: largest error {error:.1e}, PyTorch {own:.1e}")


def test_two_runs_give_the_same_bits() -> None:
    cuda_checks.check_two_runs("adafac", "high", "cpu")


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_nan_and_extremes(precision: str) -> None:
    torch.manual_seed(0)
    cuda_checks.check_nan(precision, "cpu")
    cuda_checks.check_extremes(precision, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits(dtype: torch.dtype) -> None:
    cuda_checks.check_dtype("high", "cpu", dtype)


def test_launches_do_not_grow_with_the_tensors(library: ctypes.CDLL) -> None:
    """Between a run of two steps and one of three lies one step, without the tables of the first."""
    library.fibers_launches.restype = ctypes.c_int64

    def launches(name: str, tensors: int, steps: int) -> int:
        shapes = [(6, 20), (5,)] * tensors
        params = {f"t{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
        grads = [{fqn: torch.randn_like(p) for fqn, p in params.items()} for _ in range(steps)]
        before = library.fibers_launches()
        run(name, (params, grads, [1.0] * steps))
        return int(library.fibers_launches() - before)

    for name, most in (("adafac", 6), ("velo", 6)):
        per_step = {n: launches(name, n, 3) - launches(name, n, 2) for n in (1, 6)}
        assert per_step[1] == per_step[6] <= most, (name, per_step)

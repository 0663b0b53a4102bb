"""The CUDA extension where there is a toolkit: it compiles, and its hot kernels keep everything in
registers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sass
import torch

ROOT = Path(__file__).resolve().parents[2]
# Kernels that go over elements; the others work on factors, once per item.
HOT = (
    *("gradient_kernel", "moment_kernel", "feature_kernel", "scalar_kernel", "tensor_core_kernel"),
    *("adamw_kernel", "square_kernel", "copy_kernel"),
)
# Bytes that a kernel may spill before and after its loop: of "high" with state in bfloat16 on
# Blackwell (tests/benchmarks/test_sass.py, where the loops are walked).
OUTSIDE = 96


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(f"{home}/bin/nvcc" if home else "nvcc")


# Each takes nvcc three quarters of a minute of a core: Hopper by default, and only where kernels
# differ from those of benchmarks/results/sass.json, which says what they spill; the rest of cuda.cu
# is compiled for test_fibers.py. benchmarks/gpu_check.sh names all that the extension is built for.
ARCHITECTURES = os.environ.get("PYLO_DIST_CUDA_ARCH", "90").split(";")
KNOWN = json.loads(sass.RESULT.read_text())["csrc"] == sass.digest()


@pytest.mark.skipif(nvcc() is None, reason="no nvcc: put it on the PATH or set CUDA_HOME")
@pytest.mark.skipif(
    KNOWN and "PYLO_DIST_CUDA_ARCH" not in os.environ,
    reason="benchmarks/results/sass.json is of these kernels; PYLO_DIST_CUDA_ARCH=90 compiles them",
)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_hot_kernels_do_not_spill(arch: str, tmp_path: Path, figures: list[str]) -> None:
    command = [
        str(nvcc()),
        "-std=c++17",
        "-O3",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000ull",
    ]
    command += [
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        "-Xptxas",
        "-v",
        "-c",
        str(ROOT / "csrc/cuda.cu"),
        "-o",
        "cuda.o",
    ]
    include = (ROOT / "csrc", ROOT / "csrc/include", Path(torch.__file__).parent / "include")
    done = subprocess.run(
        [*command, *(f"-I{folder}" for folder in include)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes "
        r"spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    names = [next((name for name in HOT if name in mangled), "") for mangled, *_ in found]
    assert set(HOT) <= set(names), names
    for name, (mangled, _, stack, stores, loads, registers) in zip(names, found, strict=True):
        if not name:
            continue
        variant = "".join(re.findall(r"L[bi](\d+)E", mangled)) or "-"
        figures.append(
            f"CUDA sm_{arch} | {name} {variant}: {registers} registers, {stores} + {loads} bytes "
            f"spilled, stack {stack}"
        )
        most = OUTSIDE if name == "tensor_core_kernel" and int(arch) >= 100 else 0
        assert max(int(stores), int(loads)) <= most, (name, variant, stores, loads)


NEWER = "echo '#$ -D__CUDACC_VER_MAJOR__=99' >&2"
FAILS = "echo 'nvcc fatal : no host compiler' >&2; exit 1"


@pytest.mark.parametrize(
    ("nvcc", "wanted", "said"),
    [
        (NEWER, "1", "nvcc is of CUDA 99, torch of 12.8"),
        (NEWER, "auto", "1"),  # extension: the one for CPUs
        (FAILS, "1", "nvcc fatal : no host compiler"),
        (None, "1", "there is no nvcc"),
    ],
)
def test_a_toolkit_that_does_not_fit_is_not_used(
    nvcc: str | None, wanted: str, said: str, tmp_path: Path
) -> None:
    """Its folder has a name that a shell would take apart."""
    script = tmp_path / "it's a toolkit/bin/nvcc"
    script.parent.mkdir(parents=True)
    if nvcc is not None:
        script.write_text(f"#!/bin/sh\n{nvcc}\n")
        script.chmod(0o755)
    program = (
        "import runpy, torch; torch.version.cuda = '12.8'; "
        "print(len(runpy.run_path('setup.py')['extensions']()))"
    )
    environment = {**os.environ, "PYLO_DIST_CUDA": wanted, "CUDA_HOME": str(script.parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program, "--version"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == (wanted == "1"), done.stderr
    assert said in (done.stderr if wanted == "1" else done.stdout.splitlines()[-1])

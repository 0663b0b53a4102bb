"""Build entry: the compiled passes in csrc/, where a compiler and torch are there. Everything declarative is in pyproject.toml.

They need a torch to build with, hence `pip install --no-build-isolation .`; an isolated build gives plain PyTorch.
PYLO_DIST_CUDA=1 insists on the CUDA extension, 0 leaves it out; by default it is built where nvcc is found."""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000ull"  # the stable ABI as of torch 2.10
COMMON = ["-std=c++17", "-O3", "-g0", "-Wall", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", TARGET]
# The instruction set is chosen at run time: each has a file of its own, and only that file may use it.
PER_FILE = {
    "cpu_avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma", "-Wno-uninitialized"],
    "cpu_avx2": ["-mavx2", "-mfma"],
}
X86 = PER_FILE if platform.machine() in ("x86_64", "AMD64") else {}
CPU_SOURCES = ["csrc/ops.cpp", "csrc/cpu_baseline.cpp", *(f"csrc/{name}.cpp" for name in X86)]
NVCC_FLAGS = ["-std=c++17", "-O3", "-DUSE_CUDA", TARGET, "-Xcompiler=-fPIC,-fvisibility=hidden"]
ARCHITECTURES = os.environ.get("PYLO_DIST_CUDA_ARCH", "80;90;100").split(";")  # A100, H200, B200, and PTX of the last


def said_by_nvcc(nvcc: str | None, pattern: str, *arguments: str) -> str:
    """The group of `pattern` in what nvcc prints; "" where there is no nvcc."""
    if not (nvcc and Path(nvcc).exists()):
        return ""
    done = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
    found = re.search(pattern, done.stdout + done.stderr)
    return found[1] if found else ""


# The nvcc on the PATH may be a script that calls another; that one says where it is.
AROUND_NVCC = said_by_nvcc(shutil.which("nvcc"), r"TOP=(.+)", "--dryrun", "-E", "-x", "cu", os.devnull)
CUDA_HOME = Path(os.environ.get("CUDA_HOME") or AROUND_NVCC or "/none")
NVCC = CUDA_HOME / "bin/nvcc"


class Build(build_ext):
    """build_ext with flags per file, nvcc for .cu files, and one thread per source."""

    def build_extension(self, ext: Extension) -> None:
        host, compile_all = self.compiler._compile, self.compiler.compile
        targets = [(arch, f"sm_{arch}") for arch in ARCHITECTURES] + [(ARCHITECTURES[-1], f"compute_{ARCHITECTURES[-1]}")]
        nvcc = [str(NVCC), *NVCC_FLAGS, *(f"-gencode=arch=compute_{a},code={code}" for a, code in targets)]

        def compile_one(obj, source, suffix, cc_args, extra, pp_opts):
            if suffix == ".cu":
                subprocess.check_call([*nvcc, *(o for o in pp_opts if o.startswith(("-I", "-D"))), "-c", source, "-o", obj])
            else:
                host(obj, source, suffix, cc_args, [*extra, *PER_FILE.get(Path(source).stem, [])], pp_opts)

        def compile_in_threads(sources, **kwargs):
            with ThreadPoolExecutor() as pool:
                return [obj for objs in pool.map(lambda source: compile_all([source], **kwargs), sources) for obj in objs]

        self.compiler.src_extensions.append(".cu")
        self.compiler._compile, self.compiler.compile = compile_one, compile_in_threads
        super().build_extension(ext)
        self.compiler._compile, self.compiler.compile = host, compile_all


def extensions() -> list[Extension]:
    wanted, has_nvcc = os.environ.get("PYLO_DIST_CUDA", "auto"), NVCC.exists()
    if wanted == "1" and not has_nvcc:
        sys.exit("PYLO_DIST_CUDA=1, but there is no nvcc: put it on the PATH or set CUDA_HOME, or leave PYLO_DIST_CUDA out")
    try:
        import torch
    except ImportError:
        return [] if wanted != "1" else sys.exit("PYLO_DIST_CUDA=1, but no torch here: use pip install --no-build-isolation")
    if not any(map(shutil.which, (os.environ.get("CXX", "c++").split()[0], "g++", "clang++"))):
        return []
    root = Path(torch.__file__).parent
    include, lib = ["csrc", "csrc/include", str(root / "include")], [str(root / "lib")]
    depends = [str(path) for path in Path("csrc").rglob("*.*h")]
    shared = {"depends": depends, "py_limited_api": True, "language": "c++", "extra_compile_args": COMMON}  # no Python in them
    links = {"include_dirs": include, "library_dirs": lib, "libraries": ["torch_cpu", "c10"]}
    built = [Extension("pylo_dist._kernels_cpu", CPU_SOURCES, **links, **shared)]
    toolkit, theirs = said_by_nvcc(str(NVCC), r"release (\d+)", "--version"), torch.version.cuda  # None in CPU builds
    other = bool(theirs) and theirs.split(".")[0] != toolkit  # two CUDA runtimes would meet in one process
    if other and wanted == "1":
        sys.exit(f"PYLO_DIST_CUDA=1, but nvcc is of CUDA {toolkit}, torch of {theirs}: set CUDA_HOME to a toolkit like torch's")
    if has_nvcc and wanted != "0" and not other:
        include, lib = [*include, str(CUDA_HOME / "include")], [*lib, str(CUDA_HOME / "lib64"), str(CUDA_HOME / "lib")]
        streams = [name for name in ("torch_cuda", "c10_cuda") if (root / "lib" / f"lib{name}.so").exists()]  # not in CPU builds
        links = {"include_dirs": include, "library_dirs": lib, "libraries": ["torch_cpu", "c10", *streams, "cudart"]}
        built.append(Extension("pylo_dist._kernels_cuda", ["csrc/cuda.cu"], **links, **shared))
    return built


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})

"""Build entry: the compiled passes in csrc/, where a compiler and torch are there. Everything declarative is in pyproject.toml.

Needs the torch that will be used, hence `pip install --no-build-isolation .`; an isolated build has none and gives plain PyTorch.
PYLO_DIST_CUDA=1 insists on the CUDA extension, 0 leaves it out; by default it is built where nvcc is found.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

COMMON = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-g0"]
# The instruction set is chosen at run time: each has a file of its own, and only that file may use it.
PER_FILE = {
    "cpu_avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma", "-Wno-uninitialized"],
    "cpu_avx2": ["-mavx2", "-mfma"],
}
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xcompiler", "-fvisibility=hidden", "-DUSE_CUDA"]
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000ull"  # the stable ABI as of torch 2.10
CPU_SOURCES = ["csrc/ops.cpp", "csrc/cpu_baseline.cpp", "csrc/cpu_avx2.cpp", "csrc/cpu_avx512.cpp"]
CUDA_SOURCES = ["csrc/cuda.cu"]


class Build(build_ext):
    """build_ext with flags per file, and nvcc for .cu files."""

    def build_extension(self, ext: Extension) -> None:
        compile_one = self.compiler._compile
        self.compiler.src_extensions.append(".cu")

        def compile_file(obj, source, extension, cc_args, extra, pp_opts):
            if extension == ".cu":
                include = [option for option in pp_opts if option.startswith(("-I", "-D"))]
                return subprocess.check_call([nvcc(), *CUDA_FLAGS, *gencode(), *include, "-c", source, "-o", obj])
            return compile_one(obj, source, extension, cc_args, [*extra, *PER_FILE.get(Path(source).stem, [])], pp_opts)

        self.compiler._compile = compile_file
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = compile_one


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    return f"{home}/bin/nvcc" if home else shutil.which("nvcc") or ""


def gencode() -> list[str]:
    """PYLO_DIST_CUDA_ARCH, e.g. "90;100", or those of A100, H200 and B200; PTX of the last for what comes after."""
    archs = os.environ.get("PYLO_DIST_CUDA_ARCH", "80;90;100").split(";")
    pairs = [(arch, f"sm_{arch}") for arch in archs] + [(archs[-1], f"compute_{archs[-1]}")]
    return [f"-gencode=arch=compute_{arch},code={code}" for arch, code in pairs]


def extensions() -> list[Extension]:
    wanted = os.environ.get("PYLO_DIST_CUDA", "auto")
    has_nvcc = bool(nvcc()) and Path(nvcc()).exists() and all(Path(source).exists() for source in CUDA_SOURCES)
    if wanted == "1" and not has_nvcc:
        sys.exit("PYLO_DIST_CUDA=1, but no nvcc: put it on the PATH or set CUDA_HOME, or leave PYLO_DIST_CUDA out")
    try:
        import torch
    except ImportError:
        if wanted == "1":
            sys.exit("PYLO_DIST_CUDA=1, but torch cannot be imported: pip install --no-build-isolation")
        return []
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++").split()[0], "g++", "clang++")):
        return []
    root = Path(torch.__file__).parent
    settings = {
        "include_dirs": ["csrc", "csrc/include", str(root / "include")],
        "library_dirs": [str(root / "lib")],
        "extra_compile_args": [*COMMON, TARGET],
        "py_limited_api": True,  # they use no Python at all
        "language": "c++",
    }
    headers = [str(path) for path in Path("csrc").rglob("*.h")]
    built = [Extension("pylo_dist._kernels_cpu", CPU_SOURCES, libraries=["torch_cpu", "c10"], depends=headers, **settings)]
    if wanted == "1" or (wanted != "0" and has_nvcc):
        settings["extra_compile_args"] = [TARGET]
        settings["include_dirs"].append(str(Path(nvcc()).parents[1] / "include"))
        settings["library_dirs"].append(str(Path(nvcc()).parents[1] / "lib64"))
        libraries = ["torch_cpu", "c10", "cudart"]
        built.append(Extension("pylo_dist._kernels_cuda", CUDA_SOURCES, libraries=libraries, depends=headers, **settings))
    return built


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})

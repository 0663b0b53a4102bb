"""Build entry: the compiled passes in csrc/, where there are a compiler and a torch (`pip install --no-build-isolation .`).

PYLO_DIST_CUDA=1 insists on the CUDA extension, 0 leaves it out. Everything declarative is in pyproject.toml."""

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
PER_FILE = {"cpu_avx2": ["-mavx2", "-mfma"]}
PER_FILE["cpu_avx512"] = [*PER_FILE["cpu_avx2"], *(f"-mavx512{x}" for x in ("f", "dq", "bw", "vl")), "-Wno-uninitialized"]
IS_X86 = platform.machine() in ("x86_64", "AMD64")
CPU_SOURCES = [f"csrc/{name}.cpp" for name in ("ops", "adamw", "cpu_baseline", *(PER_FILE if IS_X86 else ()))]
# nvcc may be a script that calls another; that one says where it is, and of which CUDA.
NVCC = shutil.which(f"{os.environ['CUDA_HOME']}/bin/nvcc" if os.environ.get("CUDA_HOME") else "nvcc")
SAID = subprocess.run(["sh", "-c", '"$0" --dryrun -E -x cu /dev/null 2>&1', NVCC or ":"], capture_output=True, text=True).stdout
CUDA_HOME, TOOLKIT = ("".join(re.findall(pattern, SAID)[:1]) for pattern in (r"TOP=(.+)", r"__CUDACC_VER_MAJOR__=(\d+)"))
NVCC_FLAGS = ["-std=c++17", "-O3", "-DUSE_CUDA", TARGET, "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=4"]
# A100; A10 and L40S; H200; B200; B300; RTX 50: those that this nvcc knows
KNOWN = subprocess.run(["sh", "-c", '"$0" --list-gpu-code', NVCC or ":"], capture_output=True, text=True).stdout.split()
ARCHITECTURES = [arch for arch in ("80", "86", "90", "100", "103", "120") if f"sm_{arch}" in KNOWN]
for arch in os.environ.get("PYLO_DIST_CUDA_ARCH", ";".join(ARCHITECTURES or ["80", "90"])).split(";"):
    NVCC_FLAGS.append(f"-gencode=arch=compute_{arch},code=[compute_{arch},sm_{arch}]")


class Build(build_ext):
    """build_ext with flags per file, nvcc for .cu files, and one thread per source."""

    def build_extensions(self) -> None:
        host, compile_all = self.compiler._compile, self.compiler.compile

        def compile_one(obj, source, suffix, cc_args, extra, pp_opts):
            if suffix == ".cu":
                own = [*NVCC_FLAGS, *(option for option in pp_opts if option[:2] in ("-I", "-D"))]
                subprocess.check_call([NVCC, *own, "-c", source, "-o", obj])
            else:
                host(obj, source, suffix, cc_args, [*extra, *PER_FILE.get(Path(source).stem, [])], pp_opts)

        def compile_in_threads(sources, **kwargs):
            with ThreadPoolExecutor() as pool:
                return [obj for objs in pool.map(lambda source: compile_all([source], **kwargs), sources) for obj in objs]

        self.compiler.src_extensions.append(".cu")
        self.compiler._compile, self.compiler.compile = compile_one, compile_in_threads
        super().build_extensions()


def extensions() -> list[Extension]:
    wanted = os.environ.get("PYLO_DIST_CUDA", "auto")
    try:
        import torch
    except ImportError:
        return [] if wanted != "1" else sys.exit("PYLO_DIST_CUDA=1, but no torch here: use pip install --no-build-isolation")
    fits = not torch.version.hip and (torch.version.cuda or TOOLKIT).split(".")[0] == TOOLKIT
    usable = TOOLKIT and fits  # or two CUDA runtimes meet in one process
    if wanted == "1" and not usable:
        found = f"nvcc is of CUDA {TOOLKIT}, torch of {torch.version.cuda}" if TOOLKIT else SAID.strip() or "there is no nvcc"
        sys.exit(f"PYLO_DIST_CUDA=1, but {found}: put a fitting one on the PATH, set CUDA_HOME, or leave PYLO_DIST_CUDA out")
    if not any(map(shutil.which, (os.environ.get("CXX", "c++").split()[0], "g++", "clang++"))):
        return []
    root = Path(torch.__file__).parent
    include, lib = ["csrc", "csrc/include", str(root / "include")], [str(root / "lib")]
    links = {"include_dirs": include, "library_dirs": lib, "libraries": ["torch_cpu", "c10"], "extra_compile_args": COMMON}
    shared = {"depends": [*map(str, Path("csrc").rglob("*.*h"))], "py_limited_api": True, "language": "c++"}  # no Python in them
    built = [Extension("pylo_dist._kernels_cpu", CPU_SOURCES, **links, **shared)]
    if usable and wanted != "0":
        libraries = ["torch_cpu", "c10", "cudart", *(["torch_cuda", "c10_cuda"] if torch.version.cuda else [])]
        links |= {"library_dirs": [*lib, f"{CUDA_HOME}/lib64", f"{CUDA_HOME}/lib"], "libraries": libraries}
        built.append(Extension("pylo_dist._kernels_cuda", ["csrc/cuda.cu"], **links, **shared))
    return built


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})

"""What the CUDA passes cost, read in their machine code: no GPU is needed, only nvcc and NVIDIA's
nvdisasm (in a toolkit, or pip install nvidia-cuda-nvdisasm). Compiles csrc/cuda.cu; writes the file
it is given.

    python benchmarks/sass.py                     every architecture that nvcc can, a table
    python benchmarks/sass.py --arch 90           one of them
    python benchmarks/sass.py --record            into benchmarks/results/sass.json

Of every pass the loop over elements is walked as a warp goes through it in the steady state:
float32 values and gradients of a matrix, whole tiles, nothing beyond its limits. What is counted
are instructions that a warp issues per 32 elements; a scheduler issues one per cycle, and an SM has
four. A floor follows from the count, one from the pipes that are narrower than that (double
precision, conversions, tensor cores) and one from the bytes that must move; no latency is in any of
them, so a measured time is above.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch

CSRC = record.ROOT / "csrc"
RESULT = record.RESULTS / "sass.json"
ARCHITECTURES = ("80", "89", "90", "100", "120")


@dataclass(frozen=True)
class Loop:
    """A loop over elements.

    Attributes:
        kernel: name and template arguments, as numbers.
        head: text of the source line of its `for`.
        elements: how many an iteration takes on, of one lane.
        taken: texts of source lines whose branches are taken in the steady state.
        never: texts of source lines that it does not reach; a branch that is in neither falls
            through unless that leads out of the loop or there.
        turns: of the loop over hidden units inside, where it is not unrolled.
    """

    kernel: str
    head: str
    elements: int
    taken: tuple[str, ...] = ()
    turns: int = 1
    never: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pass:
    """A pass of a rule: its loops, which add up, and the bytes of DRAM per element that it must
    move.
    """

    loops: tuple[Loop, ...]
    bytes: int


# What the steady state of the pass that looks at every element anew does.
EACH = ("index < box.sizes[d] ? 0", "if (type == FLOAT32)")
UPDATES = "for (uint32_t e = threadIdx.x; e < numel; e += blockDim.x) {"
UNITS = "for (int h = 0; h < H; ++h) {"
STRIPS = "for (; r < runs.count; r += warps_per_strip) {"
ROWS = "for (int row = 4 * warp; row < rows; row += 4 * TILE_WARPS) {"
MOVES = "for (int64_t i = first + N * threadIdx.x; i + N <= last; i += N * blockDim.x) {"
RUNS = "for (int r = threadIdx.x >> 5; r < runs.count; r += blockDim.x >> 5) {"
EIGHTS = (
    "for (; e + (COPIES_AT_ONCE - 1) * COPY_THREADS < eights; e += COPIES_AT_ONCE * COPY_THREADS) {"
)
# Rows in which something is beyond its limits, runs with another vector side, directions written,
# means that are too large to be rounded by an addition.
RARE = (
    "for (int i = 0; i < 4 && row + i < rows; ++i) {",
    "const int64_t held = ",
    "const int64_t of = held",
    "const bool here = i < left",
    "along.at(i >> 2, i & 3) = ",
    "runs.direction[",
    "constexpr uint32_t largest",
    "const Word magnitude = ",
    "const Word upper = ",
    "return magnitude > infinite",
)
HALVED = ", bfloat16"  # a pass or rule with momentum and rms in it


def passes(state: int, bytes_b: int, bytes_c: int) -> dict[str, Pass]:
    """Passes B and C for state in a dtype (`DType` of geometry.h)."""

    def runs(kernel: str, number: int) -> Pass:
        return Pass((Loop(f"{kernel} {state}", RUNS, 4, never=RARE),), number)

    def strips(kernel: str) -> Pass:
        return Pass((Loop(f"{kernel} {state}", STRIPS, 1, never=RARE),), bytes_c)

    return {
        "B small_fc": runs("feature_kernel 0 0", bytes_b),
        "B VeLO": runs("feature_kernel 1 1", bytes_b),
        "B CELO2": runs("feature_kernel 1 0", bytes_b),
        "C VeLO": runs("scalar_kernel 1 4", bytes_c),
        "C CELO2": runs("scalar_kernel 1 8", bytes_c),
        "C high": strips("tensor_core_kernel 2"),
        "C medium": strips("tensor_core_kernel 1"),
        "C highest": Pass((Loop(f"scalar_kernel 0 32 {state}", UPDATES, 1, EACH, 32),), bytes_c),
    }


PASSES = {
    "A": Pass((Loop("gradient_kernel", ROWS, 16, never=RARE),), 4),
    **passes(0, 24, 44),
    **{name + HALVED: of_pass for name, of_pass in passes(1, 16, 28).items()},
    "copy": Pass((Loop("copy_kernel", EIGHTS, 32),), 8),  # of unsharded gradients, into a bucket
    "AdamW": Pass((Loop("adamw_kernel 0", MOVES, 4),), 28),
}
RULES = {  # the passes of a step
    "VeLO": ("A", "B VeLO", "C VeLO"),
    "CELO2": ("A", "B CELO2", "C CELO2"),
    "high": ("A", "B small_fc", "C high"),
    "medium": ("A", "B small_fc", "C medium"),
}
RULES |= {
    rule + HALVED: (first, *(name + HALVED for name in others))
    for rule, (first, *others) in RULES.items()
}


@dataclass(frozen=True)
class Card:
    """What a GPU can do at its boost clock.

    Attributes:
        arch: the architecture it runs.
        gigahertz: boost clock.
        bandwidth: of its DRAM, bytes/s.
        slots: cycles of an SM that a warp's instruction of a class takes from its pipe, where that
            is more than the quarter of a cycle of its issue.
    """

    arch: str
    processors: int
    gigahertz: float
    bandwidth: float
    slots: dict[str, float]


# Results per cycle and SM: the programming guide's table of arithmetic throughput, 32 / that.
FULL = {"FP64": 0.5, "convert": 2.0, "MUFU": 2.0, "HMMA": 2.0, "LDS": 1.0, "SHFL": 1.0}
HOPPER = {**FULL, "HMMA": 1.0}
SMALL = {"FP64": 16.0, "convert": 16.0, "MUFU": 2.0, "HMMA": 4.0, "LDS": 1.0, "SHFL": 1.0}
CARDS = {
    "A100": Card("80", 108, 1.41, 2.04e12, FULL),
    "H100": Card("90", 132, 1.98, 3.35e12, HOPPER),
    "H200": Card("90", 132, 1.98, 4.8e12, HOPPER),
    "B200": Card("100", 148, 1.97, 8.0e12, HOPPER),
    "L40S": Card("89", 142, 2.52, 0.864e12, SMALL),
}
DRAM_SHARE = 0.8  # of the nominal bandwidth, what a streaming kernel gets
PARAMETERS = 355e6

# What an instruction belongs to, by the first that fits.
CLASSES = (
    ("HMMA", "HMMA"),
    ("FP64", "DFMA|DADD|DMUL|DSETP|DMNMX"),
    ("convert", r"F2F\.|I2F|F2I"),
    ("pack", "F2FP|HADD2"),
    ("MUFU", "MUFU"),
    ("FP32", "FFMA|FADD|FMUL|FSETP|FMNMX|FSEL|FCHK"),
    ("LDG", r"LDG|LD(\.|$)"),
    ("STG", r"STG|ST(\.|$)"),
    ("LDS", "LDS|STS"),
    ("spill", "LDL|STL"),
    ("SHFL", "SHFL"),
    ("control", "BRA|BSSY|BSYNC|CALL|RET|EXIT|WARPSYNC|NOP|BREAK|BMOV|BAR|MEMBAR|YIELD"),
)


def class_of(opcode: str) -> str:
    """What is left are integers, addresses, moves and constants."""
    return next((name for name, text in CLASSES if re.match(text, opcode)), "integer")


def width_of(opcode: str) -> int:
    """Bytes of a lane's access to memory."""
    bits = re.search(r"\.(64|128|U8|S8|U16|S16)(?=\.|$)", opcode)
    return {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}[bits[1]] if bits else 4


@dataclass(frozen=True)
class Instruction:
    opcode: str
    conditional: bool
    target: str  # of a branch, else ""
    source: str  # its line of source


@dataclass
class Kernel:
    code: list[Instruction]
    labels: dict[str, int]


def kernel_name(mangled: str) -> str:
    name = re.search(r"\d+([a-z_]+(?:kernel|upload))", mangled)
    return " ".join([name[1] if name else mangled, *re.findall(r"L[bi](\d+)E", mangled)])


def parse(listing: str) -> dict[str, Kernel]:
    """The kernels in what `nvdisasm -g -c` prints."""
    lines: dict[str, list[str]] = {}

    def source(path: str, number: int) -> str:
        if path not in lines:
            lines[path] = Path(path).read_text().splitlines() if Path(path).is_file() else []
        return lines[path][number - 1].strip() if number <= len(lines[path]) else ""

    kernels: dict[str, Kernel] = {}
    now, text = Kernel([], {}), ""
    for line in listing.splitlines():
        if found := re.match(r"\.text\.(\S+):", line):
            now = kernels.setdefault(kernel_name(found[1]), Kernel([], {}))
        elif found := re.match(r"\s*(\.L_x_\d+):", line):
            now.labels[found[1]] = len(now.code)
        elif found := re.search(r'//## File "([^"]+)", line (\d+)', line):
            text = source(found[1], int(found[2]))
        elif found := re.match(
            r"\s*/\*[0-9a-f]+\*/\s+\{?\s*(@!?U?P\w+\s+)?(\S+)\s*(.*?)\s*;", line
        ):
            target = re.search(r"`\((\.L_x_\d+)\)", found[3]) if found[2][:3] == "BRA" else None
            # BRA.DIV leads to what a warp does whose lanes have parted
            conditional = bool(found[1] or re.match(r"!?U?P\d", found[3]) or ".DIV" in found[2])
            now.code.append(Instruction(found[2], conditional, target[1] if target else "", text))
    return kernels


def whole(turn: list[Instruction]) -> int:
    """Its accesses to memory of 128 bits."""
    return sum(class_of(x.opcode) in ("LDG", "STG") and width_of(x.opcode) == 16 for x in turn)


def doubles(turn: list[Instruction]) -> int:
    return sum(class_of(x.opcode) == "FP64" for x in turn)


class Unwalkable(RuntimeError):
    """The code is not what this file takes it to be."""


def one_turn(kernel: Kernel, loop: Loop, first: int, last: int) -> list[Instruction] | None:
    """From a loop's first instruction back to it, within the last; None if there is no such way."""
    ways: list[tuple[list[Instruction], int, int]] = [([], first, loop.turns)]
    tried: set[tuple[int, int]] = set()
    while ways:
        turn, at, left = ways.pop()
        while first <= at <= last and len(turn) < 20000:
            now = kernel.code[at]
            if now.opcode[:5] != "BSYNC" and any(text in now.source for text in loop.never):
                break
            turn.append(now)
            to = kernel.labels[now.target] if now.target else at + 1
            if to == first:
                if left == 1:
                    return turn
                break  # the loop inside was not where it is looked for
            if first < to <= at and left > 1 and now.source == UNITS:
                left -= 1
                at = to
            elif not now.conditional or any(text in now.source for text in loop.taken):
                at = to
            else:
                if to > at + 1 and (to, left) not in tried:
                    tried.add((to, left))
                    ways.append((list(turn), to, left))
                at += 1
    return None


def walk(kernel: Kernel, loop: Loop) -> list[Instruction]:
    """One turn of a loop: of its instances, for types and alignments, the one with the most
    accesses of 128 bits, then with the fewest instructions in double (a card that is slow in it
    goes over a job again only where floats do not do), then the shortest. Raises `Unwalkable`.
    """
    ends: dict[int, int] = {}
    for i, x in enumerate(kernel.code):
        first = kernel.labels.get(x.target, i + 1)
        body = kernel.code[first : i + 1]
        if any(y.source == loop.head for y in body) and any(
            class_of(y.opcode) == "LDG" for y in body
        ):
            ends[first] = i
    turns = []
    for first, last in ends.items():
        if any(first < other and end < last for other, end in ends.items()):
            continue  # a loop around it
        turn = one_turn(kernel, loop, first, last)
        if turn:
            turns.append(turn)
    if not turns:
        raise Unwalkable(f"{loop.kernel}: no turn of {loop.head!r} ends where it began")
    return min(turns, key=lambda turn: (-whole(turn), doubles(turn), len(turn)))


def digest() -> str:
    """Of the sources that make the kernels, without what does not: comments and white space."""
    files = sorted(
        [*CSRC.glob("cuda*"), *(CSRC / "include").rglob("*.h")],
        key=lambda path: path.relative_to(CSRC).as_posix(),
    )
    whole = hashlib.sha256()
    for path in files:
        code = re.sub(r"//[^\n]*", "", path.read_text())
        whole.update((path.name + re.sub(r"\s+", "", code)).encode())
    return whole.hexdigest()


def tool(name: str) -> str | None:
    """A program of NVIDIA's toolkit, where it may be."""
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else []
    folders.append(os.environ.get("PATH", ""))
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        folders += [str(path) for path in Path(folder).glob("cu*/bin")]
    return shutil.which(name, path=os.pathsep.join(folders))


def run(command: Iterable[str]) -> str:
    done = subprocess.run(list(command), capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{done.args[0]}: {done.stderr[-2000:]}")
    return done.stdout + done.stderr


def compile_passes(arch: str, folder: Path) -> tuple[str, str]:
    """What the assembler says of the kernels of one architecture, and their listing."""
    nvcc, nvdisasm = tool("nvcc"), tool("nvdisasm")
    if nvcc is None or nvdisasm is None:
        missing = "nvcc" if nvcc is None else "nvdisasm"
        raise SystemExit(f"{missing} is neither in CUDA_HOME nor on the PATH")
    out = folder / f"{arch}.cubin"
    include = (CSRC, CSRC / "include", Path(torch.__file__).parent / "include")
    said = run(
        [
            nvcc,
            "-std=c++17",
            "-O3",
            "-DUSE_CUDA",
            "-DTORCH_TARGET_VERSION=0x020a000000000000ull",
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            "-lineinfo",
            "-Xptxas",
            "-v",
            "-cubin",
            str(CSRC / "cuda.cu"),
            "-o",
            str(out),
            *(f"-I{path}" for path in include),
        ]
    )
    return said, run([nvdisasm, "-g", "-c", str(out)])


# threads of a block; csrc/cuda.cu launches them
THREADS = {
    "copy_kernel": 256,
    "gradient_kernel": 256,
    "feature_kernel": 256,
    "feature_kernel 1 1": 128,
    "scalar_kernel 0 32": 256,
    "adamw_kernel": 256,
}


def residency(kernel: str, registers: int, shared: int, arch: str) -> int:
    """Warps that an SM holds."""
    threads = THREADS.get(kernel.rpartition(" ")[0], THREADS.get(kernel.split()[0], 128))
    most = 48 if arch in ("89", "120") else 64
    memory = {"80": 164, "89": 100, "120": 100}.get(arch, 228) << 10
    of_warp = (registers * 32 + 255) // 256 * 256
    blocks = min(
        most * 32 // threads, (1 << 16) // of_warp // (threads // 32), memory // (shared + 1024)
    )
    return blocks * threads // 32


def resources(said: str) -> dict[str, dict[str, int]]:
    """Registers, spilled bytes and shared memory of every kernel."""
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        said,
        re.DOTALL,
    )
    table = {}
    for mangled, stack, stores, loads, registers, rest in found:
        shared = re.search(r"(\d+) bytes smem", rest)
        table[kernel_name(mangled)] = {
            "registers": int(registers),
            "stack": int(stack),
            "spilled": int(stores) + int(loads),
            "shared": int(shared[1]) if shared else 0,
        }
    return table


def measure(arch: str) -> dict[str, Any]:
    """Every pass, per 32 elements."""
    with tempfile.TemporaryDirectory() as folder:
        said, listing = compile_passes(arch, Path(folder))
    kernels, used = parse(listing), resources(said)
    table: dict[str, Any] = {}
    for name, of_pass in PASSES.items():
        classes: Counter[str] = Counter()
        widths: Counter[str] = Counter()
        try:
            turns = [(loop, walk(kernels[loop.kernel], loop)) for loop in of_pass.loops]
        except Unwalkable as error:
            print(f"sm_{arch} {name} left out: {error}", file=sys.stderr)
            continue
        for loop, turn in turns:
            for x in turn:
                kind = class_of(x.opcode)
                classes[kind] += 1 / loop.elements
                if kind in ("LDG", "STG"):
                    widths[f"{kind}.{8 * width_of(x.opcode)}"] += 1 / loop.elements
        kernel = of_pass.loops[0].kernel
        table[name] = {
            "instructions": round(sum(classes.values()), 2),
            "by class": {k: round(v, 2) for k, v in classes.most_common()},
            "accesses": {k: round(v, 2) for k, v in sorted(widths.items())},
            "bytes per element": of_pass.bytes,
            **used[kernel],
            "warps per SM": residency(
                kernel, used[kernel]["registers"], used[kernel]["shared"], arch
            ),
        }
    return table


def floor(row: dict[str, Any], card: Card) -> dict[str, float]:
    """Milliseconds at 355M parameters, by what binds them."""
    per_warp = PARAMETERS / 32 / card.processors / (card.gigahertz * 1e9) * 1e3
    pipes = {k: row["by class"].get(k, 0) * slots for k, slots in card.slots.items()}
    pipes["convert"] += pipes.pop("MUFU")  # one unit
    return {
        "issue": round(row["instructions"] / 4 * per_warp, 2),
        "pipe": round(max(pipes.values()) * per_warp, 2),
        "DRAM": round(row["bytes per element"] * PARAMETERS / card.bandwidth / DRAM_SHARE * 1e3, 2),
    }


def floors(passes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of every card whose architecture was measured, the passes and whole steps: the sum over
    passes of the larger of issue and DRAM.
    """
    table: dict[str, Any] = {}
    for name, card in CARDS.items():
        if card.arch not in passes:
            continue
        of_pass = {key: floor(row, card) for key, row in passes[card.arch].items()}
        steps = {
            rule: round(sum(max(of_pass[p]["issue"], of_pass[p]["DRAM"]) for p in needs), 2)
            for rule, needs in RULES.items()
        }
        table[name] = {"passes": of_pass, "steps": steps}
    return table


def report(result: dict[str, Any]) -> str:
    before = result.get("before", {}).get("passes", {})
    rows = [["sm", "pass", "instructions", "before", "classes", "accesses", "registers", "warps"]]
    for arch, table in result["passes"].items():
        for name, row in table.items():
            old = before.get(arch, {}).get(name, {}).get("instructions", "")
            rows.append(
                [
                    arch,
                    name,
                    f"{row['instructions']:.4g}",
                    f"{old:.0f}" if old else "",
                    " ".join(f"{k} {v:.3g}" for k, v in row["by class"].items()),
                    " ".join(f"{k} {v:.3g}" for k, v in row["accesses"].items()),
                    f"{row['registers']}" + (f" + {row['spilled']} B" if row["spilled"] else ""),
                    str(row["warps per SM"]),
                ]
            )
    cards = [["card", *RULES]]
    cards += [
        [name, *(f"{steps[rule]:.1f} ms" for rule in RULES)]
        for name, steps in ((name, row["steps"]) for name, row in result["floors"].items())
    ]
    return f"{record.markdown(rows)}\n\n{record.markdown(cards)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--record", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument(
        "--before", action="store_true", help="record as what later ones are compared with"
    )
    options = parser.parse_args(arguments)
    nvcc = tool("nvcc")
    version = re.search(r"V([\d.]+)", run([nvcc, "--version"])) if nvcc else None
    result: dict[str, Any] = {
        "what": "Warp instructions per 32 elements in the machine code of the CUDA passes, and the "
        "floors in ms at 355M parameters that follow; nothing was run",
        **record.environment(),
        "csrc": digest(),
        "nvcc": version[1] if version else None,
        "passes": {arch: measure(arch) for arch in options.arch},
    }
    result["floors"] = floors(result["passes"])
    kept = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    if options.before:
        result["before"] = {k: result[k] for k in ("commit", "csrc", "passes", "floors")}
    elif "before" in kept:
        result["before"] = kept["before"]
    print(report(result))
    if options.record:
        record.write(result, RESULT)
    return 0


if __name__ == "__main__":
    sys.exit(main())

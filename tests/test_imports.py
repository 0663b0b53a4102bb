"""Imports run one way, no file grows out of hand, importing the package does nothing, and no text names a machine."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pylo_dist"
MAX_LINES = 600

# A module imports only from rows above its own (see CONTRIBUTING.md); a new module needs a place here.
ORDER = [
    {"_version", "shards", "hub"},
    {"state", "adapters.plain"},
    {"weights", "report", "optim.base", "sharded_state"},
    {"reference", "comm", "publish"},
    {"ops", "optim.arguments", "optim.stacks"},
    {"engine", "optim.factored", "gather", "adapters.dtensor", "adapters.gradients"},
    {"adapters.construction"},
    {"optimizer"},
    {"optim.<rule>"},
    {"adapters.buckets"},
    {"adapters.reduction", "adapters.gathering"},
    {"adapters.<layout>", "testing", "clip"},
    {"checkpoint"},
    {"adapters.deepspeed_checkpoint"},
    {"deepspeed"},
    {"__init__"},
    {"__main__"},
]
EMPTY = {"optim.__init__", "adapters.__init__"}  # a docstring and nothing else
NO_COLLECTIVES = {  # what these may take from torch.distributed: formats, types and wrappers
    "sharded_state": "torch.distributed.checkpoint",
    "gather": "torch.distributed.checkpoint",
    "checkpoint": "torch.distributed.checkpoint",
    "adapters.dtensor": "torch.distributed.tensor",
    "adapters.gradients": "torch.distributed.tensor",
    "adapters.fully_sharded": ("torch.distributed.fsdp", "torch.distributed.device_mesh"),
}
OPTIONAL = ("huggingface_hub", "deepspeed", "mpi4py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from runtime_nodes(node)


def resolve(module: str, node: ast.ImportFrom) -> str:
    """The absolute name of `from <this>`."""
    if not node.level:
        return node.module or ""
    package = ["pylo_dist", *module.split(".")][: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def imports(module: str) -> set[str]:
    """Absolute names of all modules that `module` imports, at any depth of its code; names from a package as modules."""
    found = set()
    for node in runtime_nodes(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve(module, node)
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return found


def own_imports(module: str) -> set[str]:
    """The modules of this package that `module` imports."""
    found = {name.removeprefix("pylo_dist.") for name in imports(module) if name.startswith("pylo_dist.")}
    return found & set(MODULES)


def place(module: str) -> int:
    """The row of ORDER a module belongs to."""
    kind = {"optim": "optim.<rule>", "adapters": "adapters.<layout>"}.get(module.split(".")[0], module)
    named = [i for i, row in enumerate(ORDER) if module in row]
    return (named or [i for i, row in enumerate(ORDER) if kind in row] or [-1])[0]


def test_the_parser_sees_imports() -> None:
    assert {"comm", "optim.base"} <= own_imports("engine")
    assert {"adapters.plain", "comm", "state"} <= own_imports("optimizer")
    assert {"reference", "optimizer"} <= own_imports("optim.adafac")
    assert "torch.distributed" in imports("comm")
    assert "huggingface_hub" in imports("hub")  # inside a function


def test_every_module_has_a_place() -> None:
    lost = [module for module in set(MODULES) - EMPTY if place(module) < 0]
    assert not lost, "put a new module into ORDER and into CONTRIBUTING.md"
    gone = [m for m in set().union(*ORDER) if m not in MODULES and "<" not in m]
    assert not gone


@pytest.mark.parametrize("module", sorted(set(MODULES) - EMPTY))
def test_imports_run_one_way(module: str) -> None:
    wrong = [name for name in own_imports(module) - EMPTY if not is_below(name, module)]
    assert not wrong, f"{module} imports {wrong}, see ORDER"


def is_below(name: str, module: str) -> bool:
    """One learned optimizer may build on another; everything else only on rows above."""
    rules = {name, module} <= {m for m in MODULES if "optim.<rule>" in ORDER[place(m)]}
    return place(name) < place(module) or (rules and module not in own_imports(name))


def test_packages_import_nothing() -> None:
    for module in EMPTY:
        assert not imports(module), module


def test_only_comm_knows_torch_distributed() -> None:
    for module, path in MODULES.items():
        if module == "comm":
            continue
        named = {name for name in imports(module) if name.startswith("torch.distributed")}
        named = {name for name in named if not name.startswith(NO_COLLECTIVES.get(module, "-"))}
        used = [n for n in runtime_nodes(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)]
        assert not named, module
        assert not any(ast.unparse(node).startswith("torch.distributed") for node in used), module


def test_rules_know_no_mesh() -> None:
    for module in MODULES:
        if module.startswith("optim."):
            assert not [name for name in own_imports(module) if name == "comm" or name.startswith("adapters.")], module


def test_no_file_is_long() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert max(lengths.values()) <= MAX_LINES, lengths


def test_importing_brings_in_nothing_optional_and_prints_nothing() -> None:
    code = f"import sys, pylo_dist; print(sorted(name for name in {OPTIONAL!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def text_files() -> Iterator[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for line in listed.stdout.splitlines():
        path = ROOT / line
        if path.is_file() and b"\0" not in path.read_bytes()[:4096]:
            yield path


def test_no_text_names_a_machine() -> None:
    forbidden = ["/" + "work/", "/" + "root/", "/" + "opt/wheels"]
    for path in text_files():
        text = path.read_text(errors="replace")
        assert not [word for word in forbidden if word in text], path.relative_to(ROOT)

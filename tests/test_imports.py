"""Folders are floors, importing the package does nothing, and no text names a machine."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pylo_dist"

# Folders are floors, the ground first: a module imports from its own folder and from floors below
# its own here, nothing else.
FLOORS = (
    ("core",),
    ("comm", "maths", "weights"),
    ("layouts",),
    ("optimizer",),
    ("optim",),
    ("adapters", "checkpoint", "testing"),
    ("deepspeed", "huggingface", "lightning"),
    ("__init__", "_moved", "__main__"),
)
GROUND = {"_version"}  # a number, for anybody
ROOMS = 16  # at most so many names at the top level
# packages that are a docstring and nothing else
BARE = {"core", "maths", "layouts", "optim", "adapters"}
NO_COLLECTIVES = {  # what these may take from torch.distributed: formats, types and wrappers
    "optimizer.sharded_state": "torch.distributed.checkpoint",
    "checkpoint.full_state": "torch.distributed.checkpoint",
    "checkpoint.index": "torch.distributed.checkpoint",
    "checkpoint.storage": "torch.distributed.checkpoint",
    "layouts.dtensor": "torch.distributed.tensor",
    "layouts.gradients": "torch.distributed.tensor",
    "adapters.fully_sharded": ("torch.distributed.fsdp", "torch.distributed.device_mesh"),
}
MOST_METHODS = 22
NAMES_OF_ACC4D19 = {
    "AdafacLO",
    "CELO2",
    "CheckpointError",
    "CommunicationError",
    "ELO",
    "ELO_CELO2",
    "LearnedOptimizer",
    "MuLO",
    "NonFiniteGradientError",
    "PeerError",
    "Registered",
    "VeLO",
    "WeightsError",
    "ZeroOptimizer",
    "__version__",
    "checkpoint",
    "clip_grad_norm_",
    "full_state_dict",
    "get_optimizer_state_dict",
    "push_to_hub",
    "register_weights",
    "registered_weights",
    "save_weights",
    "shard",
    "testing",
}
# the last as slow to import as all of torch
OPTIONAL = ("huggingface_hub", "deepspeed", "mpi4py", "torch._dynamo")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
KNOWN = {f"pylo_dist.{module.removesuffix('.__init__')}" for module in MODULES}


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
    """Absolute names of all modules that `module` imports, at any depth of its code; names from a
    package as modules.
    """
    found = set()
    for node in runtime_nodes(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve(module, node)
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= names if names <= KNOWN else names | {base}
    return found


def own_imports(module: str) -> set[str]:
    """The modules of this package that `module` imports; a package stands for its `__init__`."""
    found = {
        name.removeprefix("pylo_dist.") for name in imports(module) if name.startswith("pylo_dist.")
    }
    return {known for name in found for known in (name, f"{name}.__init__") if known in MODULES}


def room(module: str) -> str:
    """The name at the top level of the package that a module is, or is in."""
    return module.split(".")[0]


def floor(module: str) -> int:
    """The row of FLOORS a module belongs to."""
    return next((i for i, rooms in enumerate(FLOORS) if room(module) in rooms), -1)


def test_the_parser_sees_imports() -> None:
    assert {"comm.__init__", "core.rule"} <= own_imports("optimizer.engine")
    assert {"layouts.plain", "comm.__init__", "core.state"} <= own_imports("optimizer.learned")
    assert {"maths.reference", "optimizer.__init__"} <= own_imports("optim.adafac")
    assert "torch.distributed" in imports("comm.collectives")
    assert "huggingface_hub" in imports("weights.hub")  # inside a function


def test_every_module_has_a_floor() -> None:
    lost = [module for module in MODULES if floor(module) < 0 and module not in GROUND]
    assert not lost, "put a new folder into FLOORS and into CONTRIBUTING.md"
    rooms = {room(module) for module in MODULES} - GROUND
    gone = {name for row in FLOORS for name in row} - rooms
    assert not gone
    assert len(rooms) <= ROOMS, sorted(rooms)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_runs_up(module: str) -> None:
    others = {name for name in own_imports(module) - GROUND if room(name) != room(module)}
    if module == "__init__":  # it gathers what users see, and says what moved
        others -= {"_moved"}
    wrong = {name for name in others if floor(name) >= floor(module)}
    assert not wrong, f"{module} imports {sorted(wrong)}, see FLOORS"


def test_imports_inside_a_folder_run_one_way() -> None:
    """No module reaches itself; what a package's `__init__` gives to others, its own modules take
    from where it is.
    """
    for start in MODULES:
        reached, new = set(), {start}
        while new:
            new = {
                name for module in new for name in own_imports(module) if room(name) == room(start)
            } - reached
            reached |= new
        assert start not in reached, f"{start} imports itself, by {sorted(reached)}"


def test_packages_import_nothing() -> None:
    for package in BARE:
        assert not imports(f"{package}.__init__"), package


def test_only_comm_knows_torch_distributed() -> None:
    for module, path in MODULES.items():
        if room(module) == "comm":
            continue
        named = {name for name in imports(module) if name.startswith("torch.distributed")}
        named = {name for name in named if not name.startswith(NO_COLLECTIVES.get(module, "-"))}
        used = [
            n for n in runtime_nodes(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)
        ]
        assert not named, module
        assert not any(ast.unparse(node).startswith("torch.distributed") for node in used), module


def test_rules_know_no_mesh() -> None:
    for module in MODULES:
        if room(module) in ("optim", "maths", "core"):
            assert not [
                name
                for name in own_imports(module)
                if room(name) in ("comm", "layouts", "adapters")
            ], module


def test_importing_brings_in_nothing_optional_and_prints_nothing() -> None:
    # imported later, while there is a process group, torch's own module would hold that to the end
    early = "torch.distributed.nn.functional"
    code = f"import sys, pylo_dist; print([name for name in {OPTIONAL!r} if name in sys.modules])"
    code += f"; assert {early!r} in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def text_files() -> Iterator[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
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


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    """Every class of the package with the module it is in."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                yield module, node


def test_no_class_knows_too_much() -> None:
    """Few methods rather than few lines: what is more belongs to a collaborator."""
    sizes = {
        f"{module}.{node.name}": sum(isinstance(entry, ast.FunctionDef) for entry in node.body)
        for module, node in classes()
    }
    assert {name: size for name, size in sizes.items() if size > MOST_METHODS} == {}
    assert sizes["optimizer.learned.LearnedOptimizer"] > 10  # they are counted


def test_zero_asks_its_inner_optimizer_and_not_its_kind() -> None:
    for module, path in MODULES.items():
        assert "isinstance(self.inner" not in path.read_text(), module


def test_the_public_names_of_earlier_versions_are_there() -> None:
    import pylo_dist

    assert set(pylo_dist.__all__) >= NAMES_OF_ACC4D19
    assert all(hasattr(pylo_dist, name) for name in pylo_dist.__all__)

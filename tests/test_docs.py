"""What the pages say can be done: links lead somewhere, code blocks run, commands name scripts and
flags that exist, and the site is built without a warning.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.fsdp import FullyShardedDataParallel

import pylo_dist
from support.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "csrc/README.md", "examples/README.md")
    ),
    *DOCS,
]
BLOCK = re.compile(r"(?ms)^```(\w+)\n(.*?)^```")
LINK = re.compile(r"\[[^\]]*\]\((?!https?:)([^)\s]+)\)")
FLAG = re.compile(r"--[a-z][a-z-]*")
# run by tests/test_own_rule.py; of interfaces that others would have; of a package that is large
NOT_RUN = {"own_rule.md", "decisions.md"} | (
    set() if importlib.util.find_spec("lightning") else {"doors.md"}
)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"(?m)^#+ (.+)$", page.read_text())
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_front_page_fits_a_few_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in LINK.findall(page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in slugs(target)):
            dead.append(link)
    assert dead == []


def test_all_files_tell_one_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    (newest, *_) = re.findall(r"(?m)^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text())
    assert cited == newest == pylo_dist.__version__


def test_every_page_is_listed_and_every_public_name_has_a_reference() -> None:
    listed = (ROOT / "docs" / "README.md").read_text()
    missing = [page.name for page in DOCS if f"]({page.name})" not in listed]
    assert missing == ["README.md"]
    reference = (ROOT / "docs" / "reference.rst").read_text()
    modules = {"__version__", "checkpoint", "testing"}
    names = set(pylo_dist.__all__) - modules
    names |= {f"checkpoint.{name}" for name in pylo_dist.checkpoint.__all__ if name.islower()}
    assert names <= set(re.findall(r":: pylo_dist\.([\w.]+)", reference))


# ----------------------------------------------------------------------------------------- commands


@cache
def known_flags() -> set[str]:
    """All that is written as a flag in the sources of the command line."""
    sources = [*(ROOT / "launch").glob("*.py"), *(ROOT / "pylo_dist").glob("__main__.py")]
    sources += (ROOT / "benchmarks").glob("*.py")
    return {flag for path in sources for flag in re.findall(r'"(--[a-z-]+)"', path.read_text())}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_what_there_is(page: Path) -> None:
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        ours = [
            word
            for word in words
            if word.startswith(("launch/", "./", "benchmarks/", "tests/", "examples/"))
        ]
        for word in ours:
            assert (ROOT / word).exists(), line
        scripts = [i for i, word in enumerate(words) if word in ours and word.endswith(".py")]
        if scripts:
            flags = {word for word in words[scripts[0] :] if FLAG.fullmatch(word)}
            assert flags - known_flags() - {"--help"} == set(), line


# ------------------------------------------------------------------------------------------- blocks


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.ones(2, 6)).square().mean()


def run_blocks(rank: int, world: int, texts: list[str], folder: str) -> bool:
    """In order, in one process that torchrun might have started, with what a script has around
    them.
    """
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0"}
    os.environ |= {"WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.chdir(folder)
    warnings.simplefilter("ignore")
    # their default weights are on the Hub
    pylo_dist.VeLO.__init__.__kwdefaults__["weights"] = pylo_dist.random_weights("velo")
    zero2 = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}}
    zero2["optimizer"] = {"type": "AdafacLO", "params": {"weights": "demo"}}
    Path("zero2.json").write_text(json.dumps(zero2))
    for text in texts:
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
        around = {
            "torch": torch,
            "pylo_dist": pylo_dist,
            "warnings": warnings,
            "FullyShardedDataParallel": FullyShardedDataParallel,
            "model": model,
            "loss": loss_of(model),
            "loss_of": loss_of,
            "warm_up": lambda step: min(1.0, (step + 1) / 10),
        }
        if "deepspeed" in text:
            import deepspeed

            around["deepspeed"] = deepspeed
        if "transformers" in text:
            import transformers

            around["transformers"] = transformers
        if "lightning" in text:
            import lightning

            data = torch.utils.data.DataLoader(torch.ones(4, 6), batch_size=2)
            around |= {"lightning": lightning, "data": data}
        if "optimizer = " not in text:
            around["optimizer"] = pylo_dist.AdafacLO(model.named_parameters(), weights="demo")
        before = [param.detach().clone() for param in model.parameters()]
        exec(compile(text, "a page", "exec"), around)
        if "optimizer.step" in text:
            model = around["model"]
            moved = [getattr(p, "full_tensor", p.detach)() for p in model.parameters()]
            assert not all(map(torch.equal, before, moved)), text
    return True


def runnable(text: str) -> str:
    """In a process that has its group already, on a CPU."""
    text = text.replace("torch.distributed.init_process_group()\n", "")
    return text.replace("params=True, ...)", 'params=True, device_id=torch.device("cpu"))')


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name
)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    texts = blocks(page, "python")
    if page.name in NOT_RUN:
        for text in texts:
            compile(text, page.name, "exec")
        return
    if page.name == "deepspeed.md":
        pytest.importorskip("deepspeed")
    assert run_ranks(1, run_blocks, [runnable(text) for text in texts], str(tmp_path)) == [True]


# --------------------------------------------------------------------------------------------- site


@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="sphinx is not installed")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", tmp_path / "trees"]
    done = subprocess.run(
        [*words, ROOT / "docs", tmp_path / "site"],
        capture_output=True,
        text=True,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "site" / "reference.html").read_text()
    assert "pylo_dist.ZeroOptimizer" in page
    assert "bucket_cap_mb" in page

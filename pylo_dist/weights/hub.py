"""Files of Hub repositories, through huggingface_hub and its cache: in bounded time, and once per
node; writes that cache only.

Processes that start together agree through a lock file and a note beside it, so they need no rank
and no process group: one asks and downloads, the others read its files or report its error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from . import flax_state
from .client import HEX, first_line, in_words, printable
from .texts import read_json

HEAD_TIMEOUT_S = 5.0  # for the first answer; HF_HUB_ETAG_TIMEOUT, when set, is used instead
# for one download; the client itself would go on for as long as a server drops the connection half
# way
DEADLINE_S = 120.0
GRACE_S = 10.0  # others wait so much longer than the one who downloads may take

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle")
# bytes; the weights of VeLO, the largest there are, have 20 million
LARGEST = {
    WEIGHTS_FILE: 256 << 20,
    flax_state.STATE_FILE: flax_state.LARGEST,
    CONFIG_FILE: 1 << 20,
}
# branches, tags and commits, of which the client makes the name of a file
_REVISION = re.compile(r"\w[\w.+=/-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger(__name__)


class HubError(RuntimeError):
    """A repository could not be read or written; the message is one line."""


@dataclass(frozen=True)
class HubFiles:
    """What a repository holds, as files of the local cache.

    Attributes:
        weights: model.safetensors, or theta.state where there is none.
        config: config.json, where there is one.
        commit: the 40 (or 64) digits of the commit they belong to.
    """

    weights: Path
    config: Path | None
    commit: str


def download(repository: str, revision: str | None = None, *, local_only: bool = False) -> HubFiles:
    """The weights of `repository` at `revision` (branch, tag or commit; None: the default branch).

    Honours HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT and HF_TOKEN as huggingface_hub does, and falls
    back to the cache with a warning when the Hub does not answer. Nothing is asked when `revision`
    is a commit that the cache holds.

    Args:
        local_only: look into the cache and nowhere else.

    Raises:
        HubError: no such repository, revision or file, no access, only pickled files, a damaged
            file, or no answer in time.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import WeakFileLock, validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise HubError(first_line(error)) from None
    wanted = revision or constants.DEFAULT_REVISION
    if not _REVISION.fullmatch(wanted) or ".." in wanted:
        raise HubError(
            f"revision {printable(wanted)!r} of {repository}: wanted the name of a branch or tag, "
            "or a commit"
        )
    files = (
        _cached(repository, wanted)
        if local_only or constants.HF_HUB_OFFLINE or HEX.fullmatch(wanted)
        else None
    )
    if files is not None:
        return _intact(files)
    if local_only or constants.HF_HUB_OFFLINE:
        why = "no network was asked for" if local_only else "HF_HUB_OFFLINE is set"
        raise HubError(
            f"{why}, and the cache {constants.HF_HUB_CACHE} does not hold {repository} at {wanted}"
        )

    folder = (
        Path(constants.HF_HUB_CACHE)
        / ".locks"
        / repo_folder_name(repo_id=repository, repo_type="model")
    )
    stem = f"pylo_dist.{quote(wanted, safe='')}"
    note, lock = folder / f"{stem}.json", folder / f"{stem}.lock"
    before = _read_note(note)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(lock, timeout=DEADLINE_S + GRACE_S))
        except TimeoutError:
            raise HubError(
                f"another process of this node has held {lock} for {DEADLINE_S + GRACE_S:g} s; end "
                "it and try again"
            ) from None
        except OSError:
            log.debug("no lock in %s: a cache that only others write", folder, exc_info=True)
        after = _read_note(note)
        if after is not None and after != before:  # someone has asked since this call began
            if "error" in after:
                raise HubError(printable(after["error"]))
            commit = str(after.get("commit"))
            files = _cached(repository, commit) if HEX.fullmatch(commit) else None
            if files is not None:
                return _intact(files)
        try:
            files = _intact(_ask(repository, wanted))
        except HubError as error:
            _write_note(note, {"error": str(error)})
            raise
        _write_note(note, {"commit": files.commit})
        return files


def upload(
    repository: str,
    folder: Path,
    *,
    message: str,
    private: bool | None,
    revision: str | None,
    token: str | None,
) -> str:
    """Commit the files of `folder` to `repository`, made when there is none; gives the commit.

    Raises:
        HubError: no right to write there, no such branch, or no answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi(token=token)
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, revision=revision, commit_message=message
        )
    except HFValidationError as error:
        raise HubError(first_line(error)) from None
    except Exception as error:  # the errors of the transport differ between versions of the client
        raise HubError(in_words(error, repository, revision)) from error
    if not HEX.fullmatch(commit.oid):
        named = printable(repr(commit.oid), 80)
        raise HubError(f"the Hub names the commit {named}; wanted 40 or 64 hex digits")
    return commit.oid


def sha256_of(path: Path) -> str:
    """The hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _ask(repository: str, revision: str) -> HubFiles:
    """Ask the Hub which commit `revision` is, and have its files in the cache."""
    from huggingface_hub import constants

    timeout = (
        float(constants.HF_HUB_ETAG_TIMEOUT)
        if "HF_HUB_ETAG_TIMEOUT" in os.environ
        else HEAD_TIMEOUT_S
    )
    files = _cached(repository, revision)
    complete = files is not None and (
        files.config is not None or _known_without_config(repository, files.commit)
    )
    answer = _in_a_process(
        {
            "path": sys.path,
            "repository": repository,
            "revision": revision,
            "weights": [WEIGHTS_FILE, flax_state.STATE_FILE],
            "config": CONFIG_FILE,
            "largest": LARGEST,
            "pickled": PICKLED,
            "known": files.commit if files is not None and complete else None,
            "timeout": timeout,
            "answer_s": 2 * timeout,  # a name server may be silent for as long
            "download_s": DEADLINE_S,
        },
        {"HF_ENDPOINT": constants.ENDPOINT, "HF_HUB_CACHE": constants.HF_HUB_CACHE},
    )
    if "error" in answer:
        if files is None or answer["final"]:
            raise HubError(answer["error"])
        log.warning("%s; using the cached files of commit %s", answer["error"], files.commit)
        return files
    if "known" in answer:
        assert files is not None
        return files
    config = answer["config"]
    weights = Path(answer["weights"])
    return HubFiles(weights, None if config is None else Path(config), _commit_of(weights))


def _in_a_process(request: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """The last answer of client.py to a request. It ends itself when it is late; a process that
    does not is killed.
    """
    seconds = request["answer_s"] + request["download_s"] + GRACE_S
    program = Path(__file__).with_name("client.py")
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(program)],
            input=json.dumps(request),
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {seconds:g} s", "final": True}
    except OSError as error:
        return {"error": f"{sys.executable} cannot be started: {error}", "final": False}
    # a line without an end is of a process that was ended as it wrote it
    lines = done.stdout.splitlines(keepends=True)
    answers = [json.loads(line) for line in lines if line.endswith("\n")]
    last: dict[str, Any] = answers[-1] if answers else {}
    if not last.keys() & {"error", "weights", "known"}:
        why = f"the process that asked the Hub ended with exit code {done.returncode}"
        return {"error": why, "final": bool(answers)}
    return last


def _cached(repository: str, revision: str) -> HubFiles | None:
    """The files of a revision in the cache, as far as they are there."""
    from huggingface_hub import try_to_load_from_cache

    found = [
        try_to_load_from_cache(repository, name, revision=revision)
        for name in (WEIGHTS_FILE, flax_state.STATE_FILE)
    ]
    weights = next((path for path in found if isinstance(path, str)), None)
    if weights is None:
        return None
    commit = _commit_of(Path(weights))
    config = try_to_load_from_cache(repository, CONFIG_FILE, revision=commit)
    return HubFiles(Path(weights), Path(config) if isinstance(config, str) else None, commit)


def _known_without_config(repository: str, commit: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    # the client's mark for "there is none"
    return try_to_load_from_cache(repository, CONFIG_FILE, revision=commit) is not None


def _commit_of(path: Path) -> str:
    """.../snapshots/<commit>/<file> -> <commit>"""
    commit = path.parent.name
    if not HEX.fullmatch(commit):
        raise HubError(
            f"{printable(path)} lies under no commit of 40 or 64 hex digits; delete that folder of "
            "the cache, try again"
        )
    return commit


def _intact(files: HubFiles) -> HubFiles:
    """The same files, after a look at where they are, how large, and at their hashes: the client
    checks the size of what it downloads and no more.
    """
    from huggingface_hub import constants

    for path in (files.weights, files.config):
        if path is None:
            continue
        blob = path.resolve()
        # the folder of a repository may be a link to another disk, which is the user's
        homes = (Path(constants.HF_HUB_CACHE).resolve(), path.parents[2].resolve())
        if not any(blob.is_relative_to(home) for home in homes):
            raise HubError(f"{path} leads out of the cache, to {blob}; delete it, try again")
        most = LARGEST[path.name]
        if not blob.is_file() or blob.stat().st_size > most:
            raise HubError(f"{blob} is no file of at most {most} bytes; delete it, try again")
        if _SHA256.fullmatch(blob.name) and sha256_of(blob) != blob.name:
            raise HubError(
                f"{blob} is damaged: the Hub's sha256 is its name, its own is {sha256_of(blob)}; "
                "delete it, try again"
            )
    return files


def _read_note(path: Path) -> dict[str, Any] | None:
    try:
        note = read_json(path)
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def _write_note(path: Path, note: dict[str, Any]) -> None:
    """Replaced as a whole, under a new id: whoever waits sees that it is not the one before."""
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        scratch.write_text(json.dumps({"id": uuid.uuid4().hex, **note}))
        scratch.replace(path)
    except OSError:
        log.debug("no note in %s: a cache that only others write", path.parent, exc_info=True)

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
import threading
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

HEAD_TIMEOUT_S = 5.0  # for the first answer; HF_HUB_ETAG_TIMEOUT, when set, is used instead
# for one download; the client itself would go on for as long as a server drops the connection half
# way
DEADLINE_S = 120.0
GRACE_S = 10.0  # others wait so much longer than the one who downloads may take

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
PICKLED = (".bin", ".pt", ".pth", ".pkl")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class HubError(RuntimeError):
    """A repository could not be read or written; the message is one line."""


@dataclass(frozen=True)
class HubFiles:
    """What a repository holds, as files of the local cache.

    Attributes:
        config: config.json, where there is one.
        commit: the 40 digits of the commit they belong to.
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
        raise HubError(_first_line(error)) from None
    wanted = revision or constants.DEFAULT_REVISION
    files = (
        _cached(repository, wanted)
        if local_only or constants.HF_HUB_OFFLINE or _COMMIT.fullmatch(wanted)
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
                raise HubError(str(after["error"]))
            files = _cached(repository, str(after.get("commit")))
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
        raise HubError(_first_line(error)) from None
    except Exception as error:  # the errors of the transport differ between versions of the client
        raise HubError(_in_words(error, repository, revision)) from error
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
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    timeout = (
        float(constants.HF_HUB_ETAG_TIMEOUT)
        if "HF_HUB_ETAG_TIMEOUT" in os.environ
        else HEAD_TIMEOUT_S
    )
    url = hf_hub_url(repository, WEIGHTS_FILE, revision=revision)
    try:
        # hf_hub_download alone would retry for half a minute without a network; a name server may
        # be silent for as long
        head = _within(2 * timeout, lambda: get_hf_file_metadata(url, timeout=timeout))
        commit = head.commit_hash
        if commit is None:
            raise HubError(
                f"{constants.ENDPOINT} does not answer like a Hub (no commit in its headers); "
                "check HF_ENDPOINT"
            )
    except RevisionNotFoundError as error:
        raise HubError(_in_words(error, repository, revision)) from None
    except EntryNotFoundError:
        raise HubError(_within(2 * timeout, lambda: _what_is_there(repository, revision))) from None
    except Exception as error:  # the errors of the transport differ between versions of the client
        reason = _in_words(error, repository, revision)
        files = _cached(repository, revision)
        if files is None:
            raise HubError(reason) from error
        log.warning("%s; using the cached files of commit %s", reason, files.commit)
        return files
    files = _cached(repository, revision)
    if (
        files is not None
        and files.commit == commit
        and (files.config is not None or _known_without_config(repository, commit))
    ):
        return files

    def both() -> HubFiles:
        weights = Path(
            hf_hub_download(repository, WEIGHTS_FILE, revision=revision, etag_timeout=timeout)
        )
        commit = _commit_of(weights)
        try:
            config = Path(
                hf_hub_download(repository, CONFIG_FILE, revision=commit, etag_timeout=timeout)
            )
        except EntryNotFoundError:
            return HubFiles(weights, None, commit)
        return HubFiles(weights, config, commit)

    try:
        return _within(DEADLINE_S, both)
    except HubError:
        raise
    except Exception as error:
        raise HubError(_in_words(error, repository, revision)) from error


def _what_is_there(repository: str, revision: str) -> str:
    """Why a repository without WEIGHTS_FILE is refused, naming its files."""
    from huggingface_hub import HfApi

    try:
        names = sorted(HfApi().list_repo_files(repository, revision=revision))
    except Exception as error:
        return f"{repository} holds no {WEIGHTS_FILE} ({_in_words(error, repository, revision)})"
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled and not any(name.endswith(".safetensors") for name in names):
        return (
            f"{repository} holds only pickled files ({', '.join(pickled)}), which are refused; ask "
            f"for {WEIGHTS_FILE}"
        )
    return f"{repository} holds no {WEIGHTS_FILE}, only {', '.join(names) or 'nothing'}"


def _cached(repository: str, revision: str) -> HubFiles | None:
    """The files of a revision in the cache, as far as they are there."""
    from huggingface_hub import try_to_load_from_cache

    weights = try_to_load_from_cache(repository, WEIGHTS_FILE, revision=revision)
    if not isinstance(weights, str):
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
    return path.parent.name


def _intact(files: HubFiles) -> HubFiles:
    """The same files, after a look at their hashes: the client checks the size of what it downloads
    and no more.
    """
    for path in (files.weights, files.config):
        blob = path.resolve() if path is not None else None
        if blob is not None and _SHA256.fullmatch(blob.name) and sha256_of(blob) != blob.name:
            raise HubError(
                f"{blob} is damaged: the Hub's sha256 is its name, its own is {sha256_of(blob)}; "
                "delete it, try again"
            )
    return files


def _within(seconds: float, work: Callable[[], Result]) -> Result:
    """`work()`, waited for no longer than `seconds`. The client cannot be interrupted: a late
    thread ends with the process.
    """
    done: list[Result] = []
    failed: list[BaseException] = []

    def target() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=target, daemon=True, name="pylo_dist.hub")
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise HubError(f"no answer within {seconds:g} s")
    return done[0]


def _in_words(error: BaseException, repository: str, revision: str | None) -> str:
    """An error of the client in one line that names the repository and the remedy."""
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no revision {revision!r}"
    if isinstance(error, GatedRepoError):
        return (
            f"{repository} is gated: ask for access on its page, then `hf auth login` or set "
            "HF_TOKEN"
        )
    if status in (401, 403, 404):
        return (
            f"{repository}: HTTP {status}, no such repository or a private one: check it, `hf auth "
            "login` or set HF_TOKEN"
        )
    if status is not None:
        return f"{repository}: HTTP {status} from the Hub"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _read_note(path: Path) -> dict[str, Any] | None:
    try:
        note = json.loads(path.read_text())
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

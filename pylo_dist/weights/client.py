"""Ask a Hub for two files with huggingface_hub, as a process of its own that is ended when it is
late; writes the client's cache only.

What a server says is taken for what it is: ids of commits and entity tags, of which the client
makes names of files, are hex digits; a size is known and bounded before a download, and a file
cannot grow beyond it. `hub.py` starts this file as a program, with a request in JSON on standard
input, and reads one JSON object per line from standard output; it imports nothing of the package,
so that it starts without PyTorch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

HEX = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # a commit or an entity tag
_SHOWN = 300  # characters of a foreign text in a message
_NAMES = 12  # files of a repository in a message
_CLEANUP_S = 2.0  # between the error of a late process and its end


class Refused(Exception):
    """What the server says is not taken; the message is one line."""


class Late(BaseException):
    """The time is up. No `Exception`: the client tries again after many of those."""


def printable(text: object, most: int = _SHOWN) -> str:
    """A text from elsewhere for a message: one line, at most `most` characters, what no terminal
    should be sent as escapes.
    """
    escaped = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in str(text)[: most + 1]
    )
    return escaped if len(escaped) <= most else f"{escaped[:most]}..."


def first_line(error: BaseException) -> str:
    """What an error says first."""
    text = str(error).strip()
    return printable(text.splitlines()[0]) if text else type(error).__name__


def in_words(error: BaseException, repository: str, revision: str | None) -> str:
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
    return first_line(error)


class Guard:
    """Looks, as a context, at every answer before the client makes anything of it.

    Args:
        most_of: how many bytes a file of a name may have.
        alone: whether the process has nothing else to do than this download: no file that it
            writes can then grow beyond what was announced.

    Attributes:
        seen: how many answers there were.
    """

    def __init__(self, most_of: Callable[[str], int], alone: bool) -> None:
        from huggingface_hub import file_download

        self.seen = 0
        self._most_of, self._alone, self._client = most_of, alone, file_download
        self._ask = file_download.get_hf_file_metadata

    def __enter__(self) -> Guard:
        self._client.get_hf_file_metadata = self.metadata
        return self

    def __exit__(self, *_: object) -> None:
        self._client.get_hf_file_metadata = self._ask

    def metadata(self, url: str, *args: Any, **kwargs: Any) -> Any:
        """In place of the client's `get_hf_file_metadata`."""
        from huggingface_hub import constants

        self.seen += 1
        try:
            found = self._ask(url, *args, **kwargs)
        except Exception as error:
            answer = getattr(error, "response", None)
            commit = None if answer is None else answer.headers.get("X-Repo-Commit")
            if commit is not None:  # the client notes for that commit that there is no such file
                self._check_id(url, "commit", commit)
            raise
        if found.commit_hash is None:
            raise RuntimeError(
                f"{constants.ENDPOINT} does not answer like a Hub (no commit in its headers); "
                "check HF_ENDPOINT"
            )
        self._check_id(url, "commit", found.commit_hash)
        self._check_id(url, "entity tag", found.etag)
        most = self._most_of(url.rpartition("/")[2])
        if not isinstance(found.size, int) or not 0 <= found.size <= most:
            raise Refused(
                f"{printable(url)} is said to have {printable(found.size)} bytes; wanted a known "
                f"size of at most {most}"
            )
        if not self._alone:
            return found
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # the client writes a few small files beside this one
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(found.size, 1 << 16), hard))
        # its own protocol for large files has other limits; these come by HTTP as well
        return replace(found, xet_file_data=None)

    def _check_id(self, url: str, what: str, value: object) -> None:
        if not (isinstance(value, str) and HEX.fullmatch(value)):
            raise Refused(
                f"{printable(url)} comes with the {what} {printable(repr(value), 80)}; wanted 40 "
                "or 64 hex digits: check HF_ENDPOINT"
            )


class Limit:
    """The time that is left for what is being done.

    Args:
        say: tells an answer.

    Attributes:
        final: of the error of a process that did not end by itself, see `serve`.
    """

    def __init__(self, say: Callable[[dict[str, Any]], None]) -> None:
        self.final = False
        self._say = say
        self._end: threading.Timer | None = None

    def set(self, seconds: float) -> None:
        """Raise Late in the main thread after so many seconds; where that is stuck (a name server
        is asked by code that no signal interrupts) end the process soon after.
        """
        message = f"no answer within {seconds:g} s"

        def late(*_: object) -> None:
            raise Late(message)

        def end() -> None:
            self._say({"error": message, "final": self.final})
            os._exit(1)

        if self._end is not None:
            self._end.cancel()
        self._end = threading.Timer(seconds + _CLEANUP_S, end)
        self._end.daemon = True
        self._end.start()
        signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def serve(request: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    """Have the weights of a repository, the first of the wanted files that it holds, and its
    config.json where there is one, in the cache.

    Says {"commit"}, then {"weights", "config"}, paths, or {"known"} where the commit is the
    `known` one of the request; or {"error", "final"}: whether the cache does not help either.
    """
    repository, revision = request["repository"], request["revision"]
    limit = Limit(say)
    try:
        import huggingface_hub.file_download  # noqa: F401 (before the time begins)

        limit.set(request["answer_s"])
        with Guard(request["largest"].__getitem__, alone=True) as guard:
            _bring(request, guard, limit, say)
    except (Late, Refused) as error:
        say({"error": str(error), "final": limit.final or isinstance(error, Refused)})
    except Exception as error:  # the errors of the transport differ between versions of the client
        say({"error": in_words(error, repository, revision), "final": limit.final})


def _bring(
    request: dict[str, Any], guard: Guard, limit: Limit, say: Callable[[dict[str, Any]], None]
) -> None:
    """What `serve` does, but for errors."""
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    repository, revision = request["repository"], request["revision"]
    config, timeout = request["config"], request["timeout"]
    head = None
    for weights in request["weights"]:
        try:
            # hf_hub_download alone would retry for half a minute without a network
            url = hf_hub_url(repository, weights, revision=revision)
            head = guard.metadata(url, timeout=timeout)
            break
        except RevisionNotFoundError:
            limit.final = True
            raise
        except EntryNotFoundError:
            continue
    if head is None:
        limit.final = True
        why = _what_is_there(repository, revision, request["weights"][0], request["pickled"])
        raise Refused(why)
    say({"commit": head.commit_hash})
    if head.commit_hash == request["known"]:
        say({"known": True})
        return
    limit.final = True
    limit.set(request["download_s"])
    path = str(hf_hub_download(repository, weights, revision=revision, etag_timeout=timeout))
    found: dict[str, Any] = {"weights": path, "config": None}
    commit = os.path.basename(os.path.dirname(path))
    with contextlib.suppress(EntryNotFoundError):
        found["config"] = str(
            hf_hub_download(repository, config, revision=commit, etag_timeout=timeout)
        )
    if guard.seen < 2:
        raise Refused(
            "this version of huggingface_hub asks past the checks of its answers; install the "
            "version that constraints.txt names"
        )
    say(found)


def _what_is_there(repository: str, revision: str, wanted: str, pickles: list[str]) -> str:
    """Why a repository without the wanted file is refused, naming its files."""
    from huggingface_hub import HfApi

    try:
        names = sorted(HfApi().list_repo_files(repository, revision=revision))
    except Exception as error:
        return f"{repository} holds no {wanted} ({in_words(error, repository, revision)})"
    pickled = [name for name in names if name.endswith(tuple(pickles))]
    if pickled and not any(name.endswith(".safetensors") for name in names):
        return (
            f"{repository} holds only pickled files ({_listed(pickled)}), which are refused; ask "
            f"for {wanted}"
        )
    return f"{repository} holds no {wanted}, only {_listed(names) or 'nothing'}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(printable(name, 100) for name in names[:_NAMES]) + more


def main() -> None:
    """Serve the request on standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asked ends this process
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the client prints is no answer
    serve(request, lambda answer: print(json.dumps(answer), file=answers, flush=True))
    os._exit(0)  # whatever the client has left running


if __name__ == "__main__":
    main()

"""Calls in processes of their own: huggingface_hub reads its environment when it is imported.

The processes are forks of one that has imported pylo_dist and much of torch, but never
huggingface_hub.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pylo_dist
from pylo_dist.weights import (
    Registered,
    WeightsError,
    architecture_named,
    hub,
    load_weights,
    register_weights,
)
from pylo_dist.weights.publish import push_to_hub
from support.permissions import with_permission_bits
from support.ranks import CONTEXT


class Call:
    """`function(*arguments, **keywords)` in a fresh process, started; with `held` it imports the
    client and waits for `go()`.
    """

    def __init__(
        self,
        environment: dict[str, str],
        function: Callable[..., Any],
        *arguments: Any,
        held: bool = False,
        **keywords: Any,
    ) -> None:
        self.connection, other = CONTEXT.Pipe()
        given = (other, environment, held, function, arguments, keywords)
        self.process = CONTEXT.Process(target=_child, args=given, daemon=True)
        self.process.start()
        other.close()

    def ready(self, timeout: float = 40.0) -> None:
        """Return once a held process waits for `go()`."""
        assert self.connection.poll(timeout)
        assert self.connection.recv() == "ready"

    def go(self) -> None:
        self.connection.send("go")

    def result(self, timeout: float = 40.0) -> Any:
        """What the function gave; a WeightsError it raised comes as one here."""
        try:
            assert self.connection.poll(timeout), f"no result within {timeout} s"
            kind, value = self.connection.recv()
        finally:
            self.process.kill()
            self.process.join()
        if kind == "WeightsError":
            raise WeightsError(value)
        assert kind == "done", value
        return value


def _child(
    connection: Connection,
    environment: dict[str, str],
    held: bool,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
) -> None:
    assert "huggingface_hub" not in sys.modules
    for name in [name for name in os.environ if name.startswith("HF_")]:
        del os.environ[name]
    os.environ.update(
        {
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            **environment,
        }
    )
    if held:
        import huggingface_hub  # noqa: F401

        connection.send("ready")
        connection.recv()
    try:
        connection.send(("done", function(*arguments, **keywords)))
    except WeightsError as error:
        connection.send(("WeightsError", str(error)))
    except BaseException:
        connection.send(("crash", traceback.format_exc()))


def load(
    name: str, architecture: str = "small_fc", sha256: str = "", **settings: float
) -> dict[str, Any]:
    """load_weights with other limits of `pylo_dist.hub`; a WeightsError is in "error", what is
    still at work afterwards in "left".
    """
    for key, value in settings.items():
        assert hasattr(hub, key)
        setattr(hub, key, value)
    if sha256:
        register_weights("checked", Registered(architecture, name, sha256=sha256))
        name = "checked"
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    hub.log.addHandler(handler)
    start = time.perf_counter()
    found: dict[str, Any]
    try:
        network = load_weights(name, architecture_named(architecture))
        found = {"digest": network.digest, "source": network.source, "error": ""}
    except WeightsError as error:
        found = {"digest": "", "source": "", "error": str(error)}
    seconds = time.perf_counter() - start
    left = [thread.name for thread in threading.enumerate()[1:]]
    with contextlib.suppress(ChildProcessError):  # there is none
        left.append(f"a process, {os.waitpid(-1, os.WNOHANG)}")
    return {**found, "seconds": seconds, "warnings": warnings, "left": left}


def load_what_may_be_read(name: str) -> dict[str, Any]:
    """As `load`, by a user to whom permission bits mean what they say."""
    found: list[dict[str, Any]] = []
    with_permission_bits(lambda: found.append(load(name)))
    return found[0]


def push(folder: Path, repository: str, token: str) -> str:
    return push_to_hub(repository, folder, "small_fc", description="Made in a test.", token=token)


def fetch(arguments: list[str]) -> int:
    from pylo_dist.__main__ import main

    return main(arguments)


def build(optimizer: str, weights: str) -> str:
    """An optimizer on loaded weights; gives the digest."""
    import torch

    parameters = [torch.nn.Parameter(torch.ones(3, 4))]
    return str(getattr(pylo_dist, optimizer)(parameters, weights=weights).weights.digest)

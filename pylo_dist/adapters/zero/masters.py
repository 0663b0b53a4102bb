"""Float32 masters in state dicts: state named `MASTER`, beside that of the inner optimizer. Writes
masters only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ...optimizer.sharded_state import MASTER, element_part, element_state
from .buckets import Bucket, BucketParam

Groups = Sequence[dict[str, Any]]


def add_masters(state_dict: dict[str, Any], groups: Groups, buckets: Sequence[Bucket]) -> None:
    """Put this rank's part of every master into `state_dict` (modified in place).

    Args:
        groups: the inner optimizer's own, with the pieces.
    """
    for i, member, _ in _with_master(state_dict["param_groups"], groups, buckets):
        part = element_state(MASTER, member.piece.detach(), member.piece)
        state_dict["state"].setdefault(i, {})[MASTER] = part


def without_masters(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What the inner optimizer knows of a state."""
    state = {
        i: {name: t for name, t in entries.items() if name != MASTER}
        for i, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def check_masters(state_dict: dict[str, Any], groups: Groups, buckets: Sequence[Bucket]) -> None:
    """Raise the ValueError that `load_masters` would raise; changes nothing."""
    for i, member, _ in _with_master(state_dict["param_groups"], groups, buckets):
        saved = state_dict["state"].get(i, {}).get(MASTER)
        if saved is not None:
            element_part(MASTER, saved, member.piece)


def load_masters(state_dict: dict[str, Any], groups: Groups, buckets: Sequence[Bucket]) -> None:
    """Every master <- its elements of the state; where that was saved without masters, what the
    parameter holds is all there is.

    Raises:
        ValueError: one of another shape, by parameter.
    """
    for i, member, bucket in _with_master(state_dict["param_groups"], groups, buckets):
        saved = state_dict["state"].get(i, {}).get(MASTER)
        if saved is not None:
            member.piece.data.copy_(element_part(MASTER, saved, member.piece))
        else:
            member.piece.data.copy_(bucket.piece_of(member, bucket.shard))


def _with_master(
    saved_groups: Groups, groups: Groups, buckets: Sequence[Bucket]
) -> Iterator[tuple[Any, BucketParam, Bucket]]:
    """Every parameter that has a master, with its id in the groups of a state."""
    place = {id(member.piece): (member, bucket) for bucket in buckets for member in bucket.members}
    for saved_group, group in zip(saved_groups, groups, strict=True):
        for saved, piece in zip(saved_group["params"], group["params"], strict=True):
            member, bucket = place[id(piece)]
            if bucket.master is not None and member.param.numel():
                yield saved, member, bucket

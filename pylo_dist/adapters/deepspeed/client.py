"""A learned optimizer object that DeepSpeed is given becomes what its JSON entry is.

DeepSpeed exchanges the tensors in the groups of an optimizer object for its partitions. Its owner
and his schedulers hold on to the object, so it stays, with its list of groups and its hooks, and
becomes a `DeepSpeedOptimizer`. Writes the optimizer it is given.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...optimizer import LearnedOptimizer
from ...optimizer.loading import marks_of
from ...optimizer.parameters import names_of
from ...optimizer.settings import arguments_of
from .arguments import check_groups, checked_arguments, together
from .optimizer import DeepSpeedOptimizer


def become(
    client: LearnedOptimizer, kind: type[DeepSpeedOptimizer], names: Mapping[Tensor, str]
) -> None:
    """Make `client` an instance of `kind` with the same settings, not attached yet. Its state, as
    it was made, is dropped. Alike on all ranks.

    Args:
        names: full names of the parameters of the model that DeepSpeed is given.

    Raises:
        ValueError: steps were taken, or what the JSON entry could not say; on every rank, and
            nothing has been changed then.
    """
    where = f"{type(client).__name__} given to deepspeed.initialize"
    groups, kwargs = together(where, lambda: _settings(client, names))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all was said as the client was built
        held = kind(groups, **kwargs)
    for mine, its in zip(client.param_groups, held.param_groups, strict=True):
        mine.clear()
        mine.update(its)
    shared = {name: value for name, value in vars(client).items() if name.endswith("_hooks")}
    shared |= {"param_groups": client.param_groups, "_groups": client.param_groups}
    made = {**vars(held), **shared, "_where": where}
    vars(client).clear()
    vars(client).update(made)
    client.__class__ = kind  # type: ignore[assignment]


def _settings(
    client: LearnedOptimizer, names: Mapping[Tensor, str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Groups and keyword arguments that build the optimizer anew. Raises ValueError."""
    face = type(client)
    steps = max(int(group["step"]) for group in client.param_groups)
    if steps:
        raise ValueError(
            f"it has taken {steps} steps, or loaded state that has, and under DeepSpeed state "
            "begins anew: give DeepSpeed a new optimizer, and load what was saved after "
            "initialize (pylo_dist.deepspeed.load_checkpoint, or .states(engine))"
        )
    kwargs: dict[str, Any] = {**client.given, "weights": client.weights}
    if client.process_group is None:
        kwargs.pop("process_group", None)
    groups = [_group(client, group, names) for group in client.param_groups]
    for key in client.group_keys:
        by_name = [group[key] for group in groups if isinstance(group.get(key), Mapping)]
        if by_name and key in arguments_of(face):
            kwargs[key] = {name: value for entry in by_name for name, value in entry.items()}
    checked_arguments(face, kwargs)
    check_groups(groups)
    return groups, kwargs


def _group(
    client: LearnedOptimizer, group: dict[str, Any], names: Mapping[Tensor, str]
) -> dict[str, Any]:
    """A group as a user may have given it, in the names of DeepSpeed's model."""
    own = dict(zip(names_of(client.param_groups, group), group["params"], strict=True))
    renamed = {}
    for name, param in own.items():
        if param not in names:
            raise ValueError(
                f"{name!r} is no parameter of the model given to deepspeed.initialize: build the "
                "optimizer from that model's parameters"
            )
        renamed[name] = names[param]
        if "param_names" in group and name != names[param]:
            raise ValueError(
                f"{name!r} is {names[param]!r} in the model given to deepspeed.initialize: build "
                "the optimizer from that model's named_parameters(), or from its parameters()"
            )
    made = ("step", "param_names", *client.rule.group_state())
    left_out = {*made, *marks_of(client.rule, client.weights)}
    found = {key: value for key, value in group.items() if key not in left_out}
    # a bound that nobody asked for, of faces that clip unless told otherwise
    if found.get("max_grad_norm") == client.defaults.get("max_grad_norm"):
        found.pop("max_grad_norm", None)
    for key in client.group_keys:
        if isinstance(found.get(key), Mapping):
            # what is frozen now is in no partition
            found[key] = {
                renamed[name]: value
                for name, value in found[key].items()
                if name in own and own[name].requires_grad
            }
    return found

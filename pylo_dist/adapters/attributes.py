"""What users and libraries leave on parameters, such as mup's `infshape`, handed on when parameters
are exchanged for others. Writes attributes of parameters and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

Attributes = Mapping[str, Mapping[str, Any]]  # by the full name of a parameter, then their own


def attributes_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The attributes of all parameters that have some; names with a leading underscore, which
    belong to torch and to wrappers, are left out.
    """
    found = {
        fqn: {name: value for name, value in vars(param).items() if not name.startswith("_")}
        for fqn, param in model.named_parameters(remove_duplicate=False)
    }
    return {fqn: own for fqn, own in found.items() if own}


def hand_on(model: nn.Module, attributes: Attributes) -> None:
    """Give the parameters of `model` these attributes, those of now and those that FSDP2 puts in
    their place during forward passes.
    """
    for fqn, own in attributes.items():
        path, _, key = fqn.rpartition(".")
        module = model.get_submodule(path)
        _give(module._parameters[key], own)
        module.register_forward_pre_hook(_Giver(key, dict(own)))


def _give(param: Tensor | None, own: Mapping[str, Any]) -> None:
    if param is None:
        return
    for name, value in own.items():
        if not hasattr(param, name):
            setattr(param, name, value)


class _Giver:
    """Hands the attributes to whatever a module holds as a parameter as its forward pass begins."""

    def __init__(self, key: str, own: dict[str, Any]) -> None:
        self._key, self._own = key, own

    def __call__(self, module: nn.Module, _: Any) -> None:
        _give(module._parameters.get(self._key), self._own)

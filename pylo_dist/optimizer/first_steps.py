"""What only the first steps can tell of an optimizer that was built apart from its model or from
the other ranks, and the first gradient of a parameter. Reads only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import comm
from ..core.pieces import ShardBinding
from ..core.rule import LearnedRule
from ..layouts import construction, ddp, dtensor, fsdp1
from ..layouts.company import Company, company_of
from .parameters import Parameters

WHOLE_MODELS = "FSDP2, tensor parallelism or ZeroOptimizer"


class FirstSteps:
    """Guards of an optimizer.

    Args:
        looks: in how many steps it asks whether other ranks wait for this one.
    """

    def __init__(self, looks: int = construction.LOOKS) -> None:
        self._looks = looks
        self._seen: set[int] = set()  # parameters that have had a gradient, by id
        self._company: Company | None = None  # unknown before the first gradient

    def others(
        self, optimizer: torch.optim.Optimizer, rule: LearnedRule, clip: str, nonfinite: str
    ) -> ValueError | None:
        """What is wrong with the coming step because of who else has a hand in the parameters: an
        optimizer that has a part of a model's tensors alone knows nothing of the others.

        Args:
            clip, nonfinite: those of the optimizer.

        Raises:
            ValueError: inputs may run out on one rank before the others, which none of them may
                wait for; alike on all ranks.
        """
        if comm.size(comm.default_group()) == 1:
            return None
        if self._company is None:
            params = [param for group in optimizer.param_groups for param in group["params"]]
            if all(param.grad is None for param in params):
                return None
            self._company = company_of(optimizer, params)
        kind = type(optimizer).__name__
        if self._company.joins():
            raise joined(kind)
        if self._company.part is None:
            return None
        why = _crossing(rule, clip, nonfinite, optimizer.param_groups)
        if why is None:
            return None
        return ValueError(
            f"this {kind} has {self._company.part}; {why}; the step was not taken, and would not "
            "be that of one process"
        )

    def check(
        self,
        parameters: Parameters,
        bound: Sequence[tuple[ShardBinding, Tensor]],
        problem: Exception | None,
        asks: bool,
    ) -> Exception | None:
        """Look at a step that is about to be taken, of an optimizer whose tensors are shared with
        no other rank.

        Args:
            bound: the parameters that take part in it.
            problem: why this rank cannot take the step, if it cannot.
            asks: whether others may wait for this rank at all.

        Returns:
            The problem, or what is found here.

        Raises:
            ValueError: other ranks wait for this one to build what it has built, but of DTensors.
        """
        if self._looks and asks:
            self._looks -= 1
            construction.check_alone(parameters.bindings, parameters.kind)
        if len(self._seen) >= len(bound):
            return problem
        first = [
            (binding.shard.fqn, param)
            for binding, param in bound
            if param.grad is not None and id(param) not in self._seen
        ]
        if not (first or self._seen) and problem is None:
            named = [(binding.shard.fqn, param) for binding, param in bound]
            return dtensor.left_behind(named) or fsdp1.left_behind(named)
        if first and comm.size(comm.default_group()) > 1:
            problem = problem or ddp.left_out(first)
        if problem is None:
            self._seen.update(id(param) for _, param in first)
        return problem


def joined(kind: str) -> ValueError:
    """The error for an optimizer of this kind under a DDP module in a Join."""
    return ValueError(
        f"{kind} under torch.distributed.algorithms.Join: ranks whose inputs run out would take no "
        "further step, and be waited for or keep an older state; give all ranks as many batches "
        "(drop_last=True, or a sampler that pads), or use Join with throw_on_early_termination=True"
    )


def _crossing(
    rule: LearnedRule, clip: str, nonfinite: str, groups: Sequence[dict[str, object]]
) -> str | None:
    """What of an optimizer looks beyond one tensor, and what to do instead."""
    if rule.needs_loss:
        return (
            f"the rule {rule.name!r} couples all tensors of a model, by the loss if by "
            f"nothing else: use {WHOLE_MODELS}, or a rule that looks at one tensor at a time, such "
            "as AdafacLO, MuLO, ELO or CELO2"
        )
    if clip == "global" and any(group.get("max_grad_norm") is not None for group in groups):
        return (
            "max_grad_norm bounds the norm over all tensors: clip before the step with torch's "
            "get_total_norm, its square added over those ranks, and clip_grads_with_norm_, or take "
            'clip="per_tensor"'
        )
    if nonfinite == "skip":
        return (
            'nonfinite="skip" passes over a step of all tensors, and other ranks would not know: '
            'take "error"'
        )
    return None

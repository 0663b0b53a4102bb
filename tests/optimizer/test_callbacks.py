"""Closures that fail: the step is joined where nothing of theirs is missing in its groups."""

from __future__ import annotations

import pytest

from pylo_dist.optimizer.callbacks import Closures


class Group:
    sent = 0

    def _get_sequence_number_for_group(self) -> int:
        return self.sent


def test_a_closure_that_failed_joins_the_step_only_if_it_sent_all_it_had_to() -> None:
    group, closures = Group(), Closures()

    def closure(sends: int, error: Exception | None = None) -> float:
        group.sent += sends
        if error is not None:
            raise error
        return 1.0

    with pytest.raises(OSError, match="the first"):  # nobody knows what others will send
        closures.evaluate(lambda: closure(3, OSError("the first")), [group])
    assert closures.evaluate(lambda: closure(3), [group]) == (1.0, None)
    loss, problem = closures.evaluate(lambda: closure(3, OSError("after")), [group])
    assert loss is None
    assert str(problem) == "after"
    with pytest.raises(OSError, match="within"):
        closures.evaluate(lambda: closure(2, OSError("within")), [group])
    with pytest.raises(OSError, match="alone"):  # nobody to tell
        closures.evaluate(lambda: closure(3, OSError("alone")), [])

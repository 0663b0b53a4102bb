"""Every learned optimizer by name, with weights of the golden files: what a test builds where each
of them must hold.
"""

from __future__ import annotations

from typing import Any

import pylo_dist
from support.golden import celo2_weights, load, small_fc_weights, velo_weights

SMALL_FC = small_fc_weights(load("small_fc_f32"))
CELO2 = celo2_weights(load("celo2_default_f64"))
VELO = velo_weights("small")

BUILD: dict[str, tuple[type[pylo_dist.LearnedOptimizer], dict[str, Any]]] = {
    "AdafacLO": (pylo_dist.AdafacLO, {"weights": SMALL_FC}),
    "MuLO": (pylo_dist.MuLO, {"weights": SMALL_FC, "width_mults": {"matrix": 2.0}}),
    "VeLO": (pylo_dist.VeLO, {"weights": VELO, "num_steps": 50}),
    "ELO": (pylo_dist.ELO, {"weights": SMALL_FC, "lr": 0.01, "clip_grad": True}),
    "CELO2": (pylo_dist.CELO2, {"weights": CELO2, "embedding_pattern": "embedding"}),
    "ELO_CELO2": (pylo_dist.ELO_CELO2, {"weights": CELO2}),
}

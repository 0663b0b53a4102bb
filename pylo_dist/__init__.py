"""Learned optimizers for sharded training: exact ZeRO steps, from `torchrun` to a JSON entry."""

from ._version import __version__
from .adapters.zero import ZeroOptimizer
from .engine import NonFiniteGradientError
from .optim.adafac import AdafacLO
from .optim.celo2 import CELO2, ELO_CELO2
from .optim.elo import ELO
from .optim.mulo import MuLO
from .optim.velo import VeLO
from .optimizer import LearnedOptimizer
from .weights import Registered, WeightsError, register_weights, registered_weights

__all__ = [
    "CELO2",
    "ELO",
    "ELO_CELO2",
    "AdafacLO",
    "LearnedOptimizer",
    "MuLO",
    "NonFiniteGradientError",
    "Registered",
    "VeLO",
    "WeightsError",
    "ZeroOptimizer",
    "__version__",
    "register_weights",
    "registered_weights",
]

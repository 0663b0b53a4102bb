"""Learned optimizers for sharded training: exact ZeRO steps, from `torchrun` to a JSON entry."""

from . import _moved, checkpoint, testing
from ._version import __version__
from .adapters.fully_sharded import shard
from .adapters.zero.optimizer import ZeroOptimizer
from .checkpoint import CheckpointError
from .checkpoint.full_state import full_state_dict, get_optimizer_state_dict
from .comm import CommunicationError, PeerError
from .optim.adafac import AdafacLO
from .optim.celo2 import CELO2, ELO_CELO2
from .optim.elo import ELO
from .optim.mulo import MuLO
from .optim.velo import VeLO
from .optimizer import LearnedOptimizer
from .optimizer.clip import clip_grad_norm_
from .optimizer.engine import NonFiniteGradientError
from .weights import Registered, WeightsError, register_weights, registered_weights
from .weights.publish import push_to_hub, save_weights

__all__ = [
    "CELO2",
    "ELO",
    "ELO_CELO2",
    "AdafacLO",
    "CheckpointError",
    "CommunicationError",
    "LearnedOptimizer",
    "MuLO",
    "NonFiniteGradientError",
    "PeerError",
    "Registered",
    "VeLO",
    "WeightsError",
    "ZeroOptimizer",
    "__version__",
    "checkpoint",
    "clip_grad_norm_",
    "full_state_dict",
    "get_optimizer_state_dict",
    "push_to_hub",
    "register_weights",
    "registered_weights",
    "save_weights",
    "shard",
    "testing",
]

_moved.install()

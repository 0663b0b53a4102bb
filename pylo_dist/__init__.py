"""Learned optimizers for sharded training: exact ZeRO steps, from `torchrun` to a JSON entry.

A learned optimizer of the package is a file in optim/, which registers it, and a line here.
"""

from typing import TYPE_CHECKING

from . import _moved
from . import checkpoint as checkpoint
from . import testing as testing
from ._version import __version__ as __version__
from .adapters.fully_sharded import shard as shard
from .adapters.losses import keep_loss as keep_loss
from .adapters.zero.optimizer import ZeroOptimizer as ZeroOptimizer
from .checkpoint import CheckpointError as CheckpointError
from .checkpoint.full_state import full_state_dict as full_state_dict
from .checkpoint.full_state import get_optimizer_state_dict as get_optimizer_state_dict
from .comm import CommunicationError as CommunicationError
from .comm import PeerError as PeerError
from .optim.adafac import AdafacLO as AdafacLO
from .optim.celo import Celo as Celo
from .optim.celo import CeloAdam as CeloAdam
from .optim.celo2 import CELO2 as CELO2
from .optim.celo2 import ELO_CELO2 as ELO_CELO2
from .optim.elo import ELO as ELO
from .optim.mulo import MuLO as MuLO
from .optim.mulo import width_mults as width_mults
from .optim.velo import VeLO as VeLO
from .optimizer import LearnedOptimizer as LearnedOptimizer
from .optimizer import Registration as Registration
from .optimizer import load_plugin as load_plugin
from .optimizer import register_optimizer as register_optimizer
from .optimizer import registered_optimizers as registered_optimizers
from .optimizer.clip import clip_grad_norm_ as clip_grad_norm_
from .optimizer.engine import NonFiniteGradientError as NonFiniteGradientError
from .optimizer.settings import LearningRateWarning as LearningRateWarning
from .optimizer.settings import NoGradientWarning as NoGradientWarning
from .optimizer.settings import RandomWeightsWarning as RandomWeightsWarning
from .weights import Architecture as Architecture
from .weights import Registered as Registered
from .weights import WeightsError as WeightsError
from .weights import load_weights as load_weights
from .weights import register_weights as register_weights
from .weights import registered_weights as registered_weights
from .weights.publish import push_to_hub as push_to_hub
from .weights.publish import save_weights as save_weights
from .weights.random import random_weights as random_weights

if not TYPE_CHECKING:  # type checkers take `X as X` for public; `import *` takes this
    __all__ = [
        *(entry.face.__name__ for entry in registered_optimizers().values()),
        "Architecture",
        "CheckpointError",
        "CommunicationError",
        "LearnedOptimizer",
        "LearningRateWarning",
        "NoGradientWarning",
        "NonFiniteGradientError",
        "PeerError",
        "RandomWeightsWarning",
        "Registered",
        "Registration",
        "WeightsError",
        "ZeroOptimizer",
        "__version__",
        "checkpoint",
        "clip_grad_norm_",
        "full_state_dict",
        "get_optimizer_state_dict",
        "keep_loss",
        "load_plugin",
        "load_weights",
        "push_to_hub",
        "random_weights",
        "register_optimizer",
        "register_weights",
        "registered_optimizers",
        "registered_weights",
        "save_weights",
        "shard",
        "testing",
        "width_mults",
    ]

_moved.install()

"""Small token files and learned weights for the tests of launch/."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data import write_tokens
from safetensors.torch import save_file

import pylo_dist

# More threads than free cores stall PyTorch; these models are too small to gain from a second one.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokens_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.bin and val.bin of bytes with structure to learn: a word list in random order."""
    folder = tmp_path_factory.mktemp("tokens")
    words = [b"the ", b"cat ", b"sat ", b"on ", b"a ", b"mat.\n"]
    generator = np.random.default_rng(0)
    for name, count in (("train.bin", 20_000), ("val.bin", 2_000)):
        text = b"".join(words[i] for i in generator.integers(0, len(words), count))
        write_tokens(folder / name, np.frombuffer(text, np.uint8))
    return folder


@pytest.fixture(scope="session")
def learned_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name of the optimizer on the command line a folder of random weights of its architecture,
    the same in every session.
    """
    optimizers = pylo_dist.registered_optimizers()
    architectures = {name: entry.architecture for name, entry in optimizers.items()}
    # of VeLO's LSTM and of its number of MLPs; 512 and 256 in the released weights
    sizes = {"H": 16, "P": 8}
    folder = tmp_path_factory.mktemp("weights")
    for name, architecture in architectures.items():
        generator = torch.Generator().manual_seed(7)
        tensors = {}
        for key, wanted in architecture.shapes.items():
            shape = [n if isinstance(n, int) else int(n[:-1] or 1) * sizes[n[-1]] for n in wanted]
            tensors[key] = 0.2 * torch.randn(shape, generator=generator)
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
    return {name: folder / name for name in architectures}

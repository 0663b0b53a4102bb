"""Makes the scripts of launch/ importable, and gives tests small token files."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "launch", ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# More threads than free cores stall PyTorch; these models are too small to gain from a second one.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokens_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.bin and val.bin of bytes with structure to learn: a word list in random order."""
    from data import write_tokens

    folder = tmp_path_factory.mktemp("tokens")
    words = [b"the ", b"cat ", b"sat ", b"on ", b"a ", b"mat.\n"]
    generator = np.random.default_rng(0)
    for name, count in (("train.bin", 20_000), ("val.bin", 2_000)):
        text = b"".join(words[i] for i in generator.integers(0, len(words), count))
        write_tokens(folder / name, np.frombuffer(text, np.uint8))
    return folder

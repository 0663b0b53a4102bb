"""Small files as flax writes them, with numbers that are known from the keys alone.

`python tests/support/flax_files.py`, where flax is installed, writes tests/weights/flax anew with
flax's own `to_bytes`; flax 0.12.8 wrote those that are there.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parents[1] / "weights" / "flax"
WIDTHS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)  # of the groups of features

Keys = tuple[str, ...]
Shapes = dict[Keys, tuple[int, ...]]


def leaf(keys: Keys, shape: tuple[int, ...]) -> np.ndarray:
    """Multiples of 1/64 up to 2, which bfloat16 and float16 have too; others for other keys."""
    first = zlib.crc32("|".join(keys).encode())
    numbers = (first + 37 * np.arange(math.prod(shape))) % 251
    return ((numbers - 125) / 64).astype(np.float32).reshape(shape)


def lstm_shapes(inputs: int, units: int, sets: int | None) -> Shapes:
    layers = {
        "linear": (inputs, units),
        "linear_1": (inputs, units),
        "linear_2": (inputs, units),
        "rnn/linear": (2 * units, 4 * units),
        **({} if sets is None else {"rnn_to_controls": (units, sets)}),
        "step_size": (units, 1),
    }
    shapes: Shapes = {("lstm_init_state", name): (1, units) for name in ("hidden", "cell")}
    for name, shape in layers.items():
        shapes["rnn_params", name, "w"] = shape
        shapes["rnn_params", name, "b"] = shape[1:]
    return shapes


def mixed_shapes(inputs: int, units: int, sets: int) -> Shapes:
    """Celo's with 18 inputs, VeLO's with 30."""
    stack = ("ff_mod_stack", "~")
    shapes = lstm_shapes(inputs, units, sets)
    shapes |= {(*stack, f"w0__{i}"): (sets, width, 4) for i, width in enumerate(WIDTHS)}
    for layer, shape in (("0", (4,)), ("1", (4, 4)), ("2", (4, 3))):
        shapes[(*stack, f"b{layer}")] = (sets, shape[-1])
        if len(shape) == 2:
            shapes[(*stack, f"w{layer}")] = (sets, *shape)
    return shapes


def small_fc_shapes(units: int) -> Shapes:
    shapes: Shapes = {
        ("momentum_decays",): (3,),
        ("rms_decays",): (1,),
        ("adafactor_decays",): (3,),
    }
    sizes = (39, units, units, 2)
    for i in range(3):
        shapes["nn", "~", f"w{i}"] = sizes[i : i + 2]
        shapes["nn", "~", f"b{i}"] = sizes[i + 1 : i + 2]
    return shapes


SHAPES: dict[str, Shapes] = {
    "celo": mixed_shapes(18, 3, 2),
    "celo_adam": lstm_shapes(18, 3, None),
    "velo_s": mixed_shapes(30, 2, 2),
    "small_fc": small_fc_shapes(4),
}


def nested_maps(leaves: Mapping[Keys, np.ndarray]) -> dict[str, Any]:
    """Leaves in maps in maps, as a file has them."""
    root: dict[str, Any] = {}
    for keys, array in leaves.items():
        inner = root
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = array
    return root


def tree(shapes: Shapes) -> dict[str, Any]:
    """Nested maps of the numbers of `leaf`."""
    return nested_maps({keys: leaf(keys, shape) for keys, shape in shapes.items()})


def _written() -> Iterator[tuple[str, bytes]]:
    """Names of files and what flax makes of them: Celo's as it is published; VeLO's as a checkpoint
    with arrays in pieces, some in bfloat16; one of everything that a leaf can be.
    """
    from typing import NamedTuple

    import flax.struct
    import jax.numpy as jnp
    from flax import serialization

    class LSTMState(NamedTuple):
        hidden: Any
        cell: Any

    @flax.struct.dataclass
    class ParameterCheckpoint:
        params: Any
        gen_id: str
        step: int

    for name, shapes in SHAPES.items():
        theta = tree(shapes)
        if "lstm_init_state" in theta:
            theta["lstm_init_state"] = LSTMState(**theta["lstm_init_state"])
        if name == "velo_s":
            stack = theta["ff_mod_stack"]["~"]
            stack |= {key: jnp.asarray(stack[key], jnp.bfloat16) for key in ("w0__3", "b1")}
            serialization.MAX_CHUNK_SIZE = 64
            theta = ParameterCheckpoint(theta, "0123456789abcdef0123456789abcdef", 5620)
        yield f"{name}.state", serialization.to_bytes(theta)
        serialization.MAX_CHUNK_SIZE = 2**30
    leaves = {
        "0-d": np.asarray(1.5, np.float32),
        "0-d jax": jnp.asarray(-2.5),
        "scalar": np.float64(0.1),
        "integer": np.int64(-3),
        "half": leaf(("half",), (2, 3)).astype(np.float16),
        "double": leaf(("double",), (3,)).astype(np.float64) / 3.0,
        "bytes": np.arange(300, dtype=np.uint8),
        "brain": jnp.asarray(leaf(("brain",), (5,)), jnp.bfloat16),
    }
    yield "leaves.state", serialization.to_bytes(leaves)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file_name, content in _written():
        (FOLDER / file_name).write_bytes(content)

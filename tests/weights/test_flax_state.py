"""Weights as flax writes them, converted: the files of tests/weights/flax, which flax's `to_bytes`
wrote, and what nobody should have written.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from torch import Tensor

import pylo_dist
from pylo_dist.__main__ import main
from pylo_dist.optim import adafac, celo, velo
from pylo_dist.weights import (
    Registered,
    WeightsError,
    flax_kinds,
    flax_state,
    load_flax,
    load_weights,
    read_file,
    register_weights,
)
from pylo_dist.weights.publish import save_weights
from support import golden
from support.flax_files import (
    FOLDER,
    SHAPES,
    Keys,
    leaf,
    lstm_shapes,
    mixed_shapes,
    nested_maps,
    tree,
)
from support.registry import restored


def split(path: str) -> Keys:
    """The keys of a name of the reference's: rnn_params/rnn/linear/w has three."""
    first, _, rest = path.partition("/")
    inner, _, last = rest.rpartition("/")
    return (first, inner, last) if inner else (first, last)


def wanted(kind: str) -> dict[str, Tensor]:
    """What the file of a kind holds, by our names."""

    def get(path: str) -> np.ndarray:
        keys = split(path)
        return leaf(keys, SHAPES[kind][keys])

    return golden.lstm_weights(get, mlp=kind != "celo_adam")


def packed(value: Any) -> bytes:
    """msgpack of nested maps whose leaves may be arrays, as flax has them."""

    def extension(leaf: Any) -> msgpack.ExtType:
        array = np.asarray(leaf)
        return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))

    content: bytes = msgpack.packb(value, default=extension)
    return content


def array(shape: Any = (2,), dtype: Any = "float32", data: Any = bytes(8), code: int = 1) -> Any:
    """An array as told, whether it can be or not."""
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, data)))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "theta.state"


# ------------------------------------------------------------------------------------ right


@pytest.mark.parametrize("kind", ["celo", "celo_adam", "velo_s"])
def test_files_of_flax_are_converted(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """velo_s is a checkpoint of learned_optimization, with arrays in pieces and in bfloat16."""
    folder, source = tmp_path / "deep" / kind, FOLDER / f"{kind}.state"
    words = ["--architecture", kind, "--to", str(folder), "--horizon", "2000", "--licence", "mit x"]
    assert main(["weights", "convert", str(source), *words]) == 0
    network = load_weights(folder)
    said = f"{folder}: {kind} weights from {source}, digest {network.digest}\n"
    assert capsys.readouterr().out == said
    assert (network.horizon, network.licence, network.source) == (2000, "mit x", str(source))
    assert network.architecture == ("velo" if kind == "velo_s" else kind)
    assert network.constants == ({"factor": 1.0} if kind == "velo_s" else {})
    tensors = wanted(kind)
    assert set(network.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(network.tensors[name], tensor), name
        assert network.tensors[name].dtype == torch.float32
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == [kind]
    assert main(["weights", "verify", str(folder)]) == 0


def test_a_network_of_fewer_units_is_the_same_function() -> None:
    network = load_flax(FOLDER / "small_fc.state", "small_fc")
    shapes = {name: tuple(tensor.shape) for name, tensor in network.tensors.items()}
    assert shapes == dict(adafac.ARCHITECTURE.shapes)
    x = torch.randint(-8, 8, (50, 39), generator=torch.Generator().manual_seed(0)).double()
    wide = small = x
    for i, layer in enumerate(("input", "linear_0", "output")):
        w, b = (network.tensors[f"network.{layer}.{kind}"].double() for kind in ("weight", "bias"))
        wide = wide @ w.T + b
        inner = [("nn", "~", f"{kind}{i}") for kind in "wb"]
        own = [torch.tensor(leaf(keys, SHAPES["small_fc"][keys])).double() for keys in inner]
        small = small @ own[0] + own[1]
        if i < 2:
            wide, small = wide.relu(), small.relu()
    assert torch.equal(wide, small)  # sums of small multiples of 2^-18
    assert small.unique().numel() > 50
    for name, values in network.decays.items():
        assert values == tuple(leaf((name,), (len(values),)).tolist())


def test_a_step_is_that_of_the_golden_run(file: Path, tmp_path: Path) -> None:
    """VeLO's golden network, written with 100 times its P sets, read as velo_s with its factor 1:
    the numbers are int8 times a power of two, so that float32 has the hundredfold exactly.
    """
    leaves = {}
    for path, array in golden.velo_meta("small").items():
        keys = split(path)
        leaves[keys] = array * np.float32(100 if keys[0] == "ff_mod_stack" else 1)
    file.write_bytes(packed(nested_maps(leaves)))
    save_weights(tmp_path / "velo_s", load_flax(file, "velo_s"))
    arrays = golden.load("velo_small_f64")

    def build(params: list[tuple[str, Tensor]], _: Any) -> pylo_dist.LearnedOptimizer:
        num_steps = int(arrays["num_steps"])
        return pylo_dist.VeLO(
            params, num_steps=num_steps, weights=tmp_path / "velo_s", tie_break="as_given"
        )

    for step in golden.run(golden.Case("velo_s", build), arrays, torch.float64):
        for i, param in enumerate(step.params):
            error = golden.relative(param - step.before[i], golden.updates(arrays, i)[step.t])
            assert error <= (1e-5 if param.dim() == 0 else 2e-6), (i, step.t, error)
    # the factor is part of what weights are
    other = load_flax(file, "velo")
    assert other.digest != load_weights(tmp_path / "velo_s").digest
    assert other.tensors_digest == load_weights(tmp_path / "velo_s").tensors_digest


def test_every_kind_of_leaf() -> None:
    arrays = flax_state.read_arrays(FOLDER / "leaves.state")
    found = {keys[0]: (str(a.dtype), a.shape, a.ravel().tolist()) for keys, a in arrays.items()}
    assert found == {
        "0-d": ("float32", (), [1.5]),
        "0-d jax": ("float32", (), [-2.5]),
        "scalar": ("float64", (), [0.1]),
        "integer": ("int64", (), [-3]),
        "half": ("float16", (2, 3), leaf(("half",), (6,)).tolist()),
        "double": ("float64", (3,), (leaf(("double",), (3,)).astype(np.float64) / 3.0).tolist()),
        "bytes": ("uint8", (300,), [i % 256 for i in range(300)]),
        "brain": ("float32", (5,), leaf(("brain",), (5,)).tolist()),
    }
    assert b"\xd8\x01" in (FOLDER / "leaves.state").read_bytes()  # fixext16: 0-d float32
    assert b"chunked" in (FOLDER / "velo_s.state").read_bytes()
    assert b"bfloat16" in (FOLDER / "velo_s.state").read_bytes()


def test_architectures_are_named_or_told_by_their_inputs(file: Path, tmp_path: Path) -> None:
    for kind in ("celo", "celo_adam"):
        file.write_bytes((FOLDER / f"{kind}.state").read_bytes())
        for source in (file, file.parent):  # a folder that the Hub was downloaded to
            assert load_weights(source).architecture == kind
    face = pylo_dist.CeloAdam([torch.nn.Parameter(torch.ones(3))], num_steps=9, weights=file)
    assert torch.equal(
        face.weights.tensors["step_size.bias"], wanted("celo_adam")["step_size.bias"]
    )

    # sizes of all kinds, and a file that fits no kind for lack of one input
    for inputs, fits in ((18, "celo"), (30, "velo"), (24, "none")):
        file.write_bytes(packed(tree(mixed_shapes(inputs, 5, 3))))
        if fits == "celo":
            assert load_weights(file).architecture == fits
            continue
        words = "fit none; name the" if fits == "none" else "does not say the factor that velo"
        with pytest.raises(WeightsError, match=words):
            load_weights(file)


def test_a_factor_that_nobody_said_is_not_guessed(file: Path) -> None:
    file.write_bytes((FOLDER / "velo_s.state").read_bytes())
    with pytest.raises(WeightsError, match=r"--architecture velo\|velo_s --to FOLDER"):
        load_weights(file, velo.ARCHITECTURE)
    with restored():
        for name, factor in (("mine", 1.0), ("other", 100.0)):
            register_weights(name, Registered("velo", str(file), constants={"factor": factor}))
        mine, other = load_weights("mine"), load_weights("other")
        assert (mine.constants, other.constants) == ({"factor": 1.0}, {})
        assert other.digest == load_flax(file, "velo").digest
        assert mine.digest == load_flax(file, "velo_s").digest != other.digest
        register_weights(
            "odd", Registered("celo", str(FOLDER / "celo.state"), constants={"x": 1.0})
        )
        with pytest.raises(WeightsError, match=r"unknown constants \['x'\], celo has \[\]"):
            load_weights("odd")
    shape = [torch.nn.Parameter(torch.ones(3))]
    rule = pylo_dist.VeLO(shape, num_steps=9, weights=mine).rule
    assert rule.factor == 1.0
    with pytest.warns(UserWarning, match="runs of up to 2000"):
        pylo_dist.VeLO(shape, num_steps=2001, weights=replace(mine, horizon=2000))


@pytest.mark.parametrize("stored", [[1.0], {"factor": "1"}, {"factor": math.nan}, {"facto": 1.0}])
def test_constants_in_a_card_are_looked_at(stored: Any, tmp_path: Path) -> None:
    save_weights(tmp_path / "w", load_flax(FOLDER / "velo_s.state", "velo_s"))
    path = tmp_path / "w" / "model.safetensors"
    tensors, card = read_file(path)
    from safetensors.torch import save_file

    from pylo_dist.weights import CARD_KEY

    save_file(tensors, path, {CARD_KEY: json.dumps({**card, "constants": stored})})
    with pytest.raises(WeightsError, match=r"constants|is no number of JSON"):
        load_weights(tmp_path / "w")
    save_file(tensors, path, {CARD_KEY: json.dumps({**card, "constants": {"factor": 2.0}})})
    with pytest.raises(pylo_dist.WeightsError, match="they were changed after"):
        load_weights(tmp_path / "w")


# ------------------------------------------------------------------------------------ wrong


@pytest.mark.parametrize(("name", "stride"), [("leaves", 1), ("celo_adam", 3), ("velo_s", 17)])
def test_files_that_end_early_or_late_or_are_changed(name: str, stride: int) -> None:
    """At every byte of a file with parts of every kind; what is changed may still be a file."""
    content = (FOLDER / f"{name}.state").read_bytes()
    for end in range(0, len(content), stride):
        with pytest.raises(ValueError, match=r"incomplete input|exceeds max"):
            flax_state.parsed(content[:end])
    for at in range(0, len(content), stride):
        for other in (0x00, 0xFF, content[at] ^ 0x80, 0xDD):
            with contextlib.suppress(ValueError):
                flax_state.parsed(content[:at] + bytes([other]) + content[at + 1 :])
    with pytest.raises(ValueError, match="extra data"):
        flax_state.parsed(content + b"\xc0")


def nested(depth: int) -> bytes:
    return b"\x81\xa1a" * depth + b"\xc0"


CHUNKS = {"0": np.zeros(4, np.float32), "1": np.zeros(2, np.float32)}
PIECES = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 3}, "chunks": CHUNKS}
INSIDE: dict[str, tuple[Any, str]] = {
    "complex": (array((2,), "complex64", bytes(16)), "dtype 'complex64', wanted one of float16"),
    "native complex": (msgpack.ExtType(2, msgpack.packb((1.0, 2.0))), "a complex number"),
    "unknown extension": (msgpack.ExtType(9, b"1"), "an extension 9"),
    "time": (msgpack.Timestamp(1), "wanted an array"),
    "objects": (array((1,), "object", bytes(8)), "dtype 'object'"),
    "a dtype with an order": (array((2,), ">f4"), "dtype '>f4'"),
    "too few bytes": (array((3,)), r"an array is float32 (3,) and has 8 bytes"),
    "too many bytes": (array((1,)), r"an array is float32 (1,) and has 8 bytes"),
    "nothing": (array((0, 2**60), data=b""), "and has 0 bytes"),
    "negative": (array((-2, -1)), "an array is float32 (-2, -1)"),
    "shape of floats": (array((2.0,)), "wanted, [shape, dtype, bytes]"),
    "shape of truths": (array((True, True)), "wanted, [shape, dtype, bytes]"),
    "bytes as text": (array(data="12345678"), "wanted, [shape, dtype, bytes]"),
    "dtype as bytes": (array(dtype=b"float32"), "wanted, [shape, dtype, bytes]"),
    "two parts": (msgpack.ExtType(1, msgpack.packb(([2], "float32"))), "[shape, dtype, bytes]"),
    "no array at all": (msgpack.ExtType(1, b"\xc0"), "[shape, dtype, bytes]"),
    "an array cut": (msgpack.ExtType(1, b"\x93\x91"), "incomplete input"),
    "an array and more": (msgpack.ExtType(1, b"\xc0\xc0"), "extra data"),
    "many dims": (array((1,) * 9, data=bytes(4)), "exceeds max_array_len(8)"),
    "a float": (1.0, "a is a float, wanted an array"),
    "a list": ([1, 2], "a is a list, wanted an array"),
    "none": (None, "a is a NoneType, wanted an array"),
    "pieces of others": ({**PIECES, "more": 1}, "an array in pieces is not what was wanted"),
    "pieces without shape": ({**PIECES, "shape": 6}, "an array in pieces is not"),
    "pieces that lack one": ({**PIECES, "chunks": {"0": CHUNKS["0"]}}, "an array in pieces"),
    "pieces out of order": (
        {**PIECES, "chunks": {"0": CHUNKS["0"], "2": CHUNKS["1"]}},
        "in pieces",
    ),
    "pieces of two dtypes": (
        {**PIECES, "chunks": {**CHUNKS, "1": np.zeros(2)}},
        "an array in pieces is not",
    ),
    "pieces that are not flat": (
        {**PIECES, "chunks": {"0": np.zeros((2, 3), np.float32)}},
        "an array in pieces is not",
    ),
    "no pieces": ({**PIECES, "shape": {"0": 0}, "chunks": {}}, "an array in pieces is not"),
}
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "incomplete input"),
    "a number": (b"\x07", "it holds a int, wanted a map"),
    "a list": (b"\x91\x07", "it holds a list, wanted a map"),
    "an array": (packed(np.zeros(3)), "it holds a ndarray, wanted a map"),
    "a pickle": (b"\x80\x04\x95", "it is a pickle, which is refused"),
    "a zip": (b"PK\x03\x04....", "it is a zip archive"),
    "a key twice": (b"\x82\xa1a\xc0\xa1a\xc0", "the key 'a' is there twice"),
    "a key of bytes": (b"\x81\xc4\x01a\xc0", "a key is a bytes, wanted a text"),
    "a number as key": (b"\x81\x07\xc0", "int is not allowed for map key"),
    "a list as key": (b"\x81\x91\x07\xc0", "key"),
    "a key that is no text": (b"\x81\xa1\xff\xc0", "can't decode byte 0xff"),
    "a long key": (b"\x81\xda\x10\x00" + b"k" * 4096 + b"\xc0", "exceeds max_str_len(256)"),
    "unused byte": (b"\xc1", "it is no msgpack, or nested"),
    "40 deep": (nested(40), "nested more than 8 maps deep"),
    "5000 deep": (nested(5000), "nested too deeply"),
    "5000 lists deep": (b"\x81\xa1a" + b"\x91" * 5000 + b"\xc0", "nested too deeply"),
    "2^32 in a map": (b"\xdf\xff\xff\xff\xff", "exceeds max_map_len(256)"),
    "2^32 in a list": (b"\x81\xa1a\xdd\xff\xff\xff\xff", "exceeds max_array_len(8)"),
    "2^32 in bytes": (b"\x81\xa1a\xc6\xff\xff\xff\xff", "incomplete input"),
    "2^32 in a text": (b"\x81\xa1a\xdb\xff\xff\xff\xff", "incomplete input"),
    "2^32 in an extension": (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "exceeds max_ext_len("),
    "many lists": (
        packed({str(i): [[[[0] * 8] * 8] * 8] * 8 for i in range(20)}),
        "more than 10000 parts",
    ),
    "a control character": (packed({"a\nb\x07": 1.0}), r"a\nb\x07 is a float"),
    **{name: (packed({"a": value}), words) for name, (value, words) in INSIDE.items()},
}


@pytest.mark.parametrize("case", FILES)
def test_what_is_no_file_of_flax_is_one_line_and_nothing_is_written(
    case: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, words = FILES[case]
    file.write_bytes(content)
    to = str(tmp_path / "to")
    assert main(["weights", "convert", str(file), "--architecture", "celo", "--to", to]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {file} is no readable file of flax's format: ")
    assert captured.err.count("\n") == 1
    assert captured.err[:-1].isprintable()
    assert words in captured.err
    assert len(captured.err) < 600 + len(str(file))
    assert list(tmp_path.iterdir()) == [file]


def changed(kind: str, change: Callable[[dict[str, Any]], object]) -> bytes:
    theta = tree(SHAPES[kind])
    change(theta)
    return packed(theta)


def spoilt(value: float) -> Callable[[dict[str, Any]], object]:
    return lambda theta: np.put(theta["rnn_params"]["rnn/linear"]["w"], 5, value)


STACK = ("ff_mod_stack", "~")
NETWORKS: dict[str, tuple[str, bytes, str]] = {
    "celo as velo": (
        "velo",
        packed(tree(SHAPES["celo"])),
        "(3, 18), wanted floating point ('H', 30) with H = 3; these are tensors of celo",
    ),
    "velo as celo": ("celo", packed(tree(SHAPES["velo_s"])), "these are tensors of velo"),
    "celo_adam as celo": (
        "celo",
        packed(tree(SHAPES["celo_adam"])),
        "missing ff_mod_stack . ~ . b0, ff_mod_stack . ~ . b1,",
    ),
    "celo as celo_adam": (
        "celo_adam",
        packed(tree(SHAPES["celo"])),
        "these are arrays of celo",
    ),
    "small_fc as velo_s": ("velo_s", packed(tree(SHAPES["small_fc"])), "these are arrays of small"),
    "two sizes": (
        "celo_adam",
        packed(tree(lstm_shapes(18, 3, None) | {("rnn_params", "linear", "w"): (18, 4)})),
        "wanted floating point",
    ),
    "nan": (
        "celo_adam",
        changed("celo_adam", spoilt(math.nan)),
        "'lstm.linear.weight' holds inf or",
    ),
    "inf": ("celo", changed("celo", spoilt(math.inf)), "'lstm.linear.weight' holds inf or NaN"),
    "integers": (
        "celo_adam",
        changed("celo_adam", lambda t: t["lstm_init_state"].update(cell=np.ones((1, 3), np.int32))),
        "'lstm_init_state.1' is torch.int32",
    ),
    "beyond float32": (
        "celo_adam",
        changed("celo_adam", lambda t: t["lstm_init_state"].update(cell=np.full((1, 3), 1e39))),
        "holds numbers that float32",
    ),
    "0-d": (
        "celo_adam",
        changed("celo_adam", lambda t: t["rnn_params"]["step_size"].update(b=np.float32(1))),
        "'step_size.bias' is torch.float32 (), wanted",
    ),
    "a group is missing": (
        "celo",
        changed("celo", lambda t: t["ff_mod_stack"]["~"].pop("w0__6")),
        "unexpected ff_mod_stack . ~ . w0__10",
    ),
    "the last group is missing": (
        "celo",
        changed("celo", lambda t: t["ff_mod_stack"]["~"].pop("w0__13")),
        "'input_weights_' is torch.float32 (2, 4, 27)",
    ),
    "groups that cannot be joined": (
        "celo",
        changed("celo", lambda t: t["ff_mod_stack"]["~"].update(w0__3=np.zeros((3, 3, 4)))),
        "cannot be joined",
    ),
    "a group of one axis": (
        "celo",
        changed("celo", lambda t: t["ff_mod_stack"]["~"].update(w0__0=np.zeros(4))),
        "cannot be joined",
    ),
    "one more": ("celo", changed("celo", lambda t: t.update(more=np.zeros(1))), "unexpected more"),
    "a checkpoint of training": (
        "celo",
        packed({"gradient_learner_state": {}, "elapsed_time": 1.0}),
        "elapsed_time is a float",
    ),
    "decays of none": (
        "small_fc",
        changed("small_fc", lambda t: t.update(rms_decays=np.full(1, math.nan))),
        "wanted a list of numbers",
    ),
    "two sizes of hidden layers": (
        "small_fc",
        changed("small_fc", lambda t: t["nn"]["~"].update(b0=np.zeros(5, np.float32))),
        "wanted floating point",
    ),
    "too many units": (
        "small_fc",
        changed(
            "small_fc",
            lambda t: t["nn"]["~"].update(
                w0=np.zeros((39, 64)),
                b0=np.zeros(64),
                w1=np.zeros((64, 64)),
                b1=np.zeros(64),
                w2=np.zeros((64, 2)),
            ),
        ),
        "(64,), wanted floating point (32,)",
    ),
    "features of another": (
        "small_fc",
        changed("small_fc", lambda t: t["nn"]["~"].update(w0=np.zeros((38, 4), np.float32))),
        "(32, 38), wanted floating point (32, 39)",
    ),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_other_networks_are_refused_by_name(
    case: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, content, words = NETWORKS[case]
    file.write_bytes(content)
    to = str(tmp_path / "to")
    assert main(["weights", "convert", str(file), "--architecture", kind, "--to", to]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [file]


def test_other_files_are_refused(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert(path: Path, *more: str) -> str:
        words = ["--architecture", "celo_adam", "--to", str(tmp_path / "to"), *more]
        assert main(["weights", "convert", str(path), *words]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert not (tmp_path / "to").exists()
        return said

    assert "No such file" in convert(tmp_path / "gone.state")
    assert "Is a directory" in convert(tmp_path)
    for name in ("theta.pkl", "model.pt", "theta.pickle"):
        (tmp_path / name).write_bytes((FOLDER / "celo_adam.state").read_bytes())
        assert "these are refused" in convert(tmp_path / name)
    assert "weights= takes it as it is" in convert(tmp_path / "model.safetensors")
    with file.open("wb") as large:
        large.truncate(flax_state.LARGEST + 1)
    assert f"has more than {flax_state.LARGEST} bytes" in convert(file)
    assert "wanted a number of steps" in convert(FOLDER / "celo_adam.state", "--horizon", "0")
    with pytest.raises(SystemExit):
        main(["weights", "convert", str(file), "--architecture", "elo", "--to", "to"])
    with pytest.raises(WeightsError, match="architecture 'elo': wanted one of small_fc, "):
        load_flax(file, "elo")
    assert {"celo", "celo_adam", "velo", "velo_s", "small_fc"} <= set(flax_kinds())
    file.write_bytes((FOLDER / "small_fc.state").read_bytes())
    with pytest.raises(WeightsError, match="elo is not read from files of flax"):
        load_weights(file, pylo_dist.weights.architecture_named("elo"))


def test_without_msgpack_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "msgpack":
            raise ModuleNotFoundError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(WeightsError, match="not installed: pip install msgpack"):
        load_flax(FOLDER / "celo.state", "celo")


def test_a_folder_appears_whole_or_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pylo_dist.weights import publish

    source, to = load_flax(FOLDER / "celo.state", "celo"), tmp_path / "to"

    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    save_weights(tmp_path / "there", load_flax(FOLDER / "celo_adam.state", "celo_adam"))
    before = {path: path.read_bytes() for path in (tmp_path / "there").iterdir()}
    monkeypatch.setattr(publish, "_model_card", full)
    with pytest.raises(WeightsError, match=r"cannot be written: .*No space left"):
        save_weights(to, source)
    with pytest.raises(WeightsError, match=r"cannot be written: .*No space left"):
        save_weights(tmp_path / "there", source, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert {path: path.read_bytes() for path in (tmp_path / "there").iterdir()} == before


def test_what_is_announced_is_not_made_room_for(file: Path) -> None:
    """Lists in lists that each announce all that a list may: bounded by the file's own size."""
    import tracemalloc

    file.write_bytes(b"\x81\xa1a" + (b"\xdc" + struct.pack(">H", 8)) * 900)
    tracemalloc.start()
    with pytest.raises(WeightsError):
        flax_state.read_arrays(file)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_all_kinds_have_a_table_of_their_own_names() -> None:
    for kind, (known, constants) in flax_kinds().items():
        assert known.flax is not None
        assert set(known.flax.tensors) == set(known.shapes), kind
        assert set(known.flax.decays) == set(known.decays), kind
        assert set(constants) == set(known.constants), kind
    assert celo.ARCHITECTURE.constants == {}

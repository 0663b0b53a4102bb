"""The tensor-core program of the CUDA kernels, on emulated warps: the same header, compiled by the
C++ compiler.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from pylo_dist.optim.adafac import ARCHITECTURE as SMALL_FC
from pylo_dist.weights import load_weights

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PARTS = {"high": 2, "medium": 1}


@pytest.fixture(scope="module")
def lanes(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: the lane program is compiled by the test")
    library = tmp_path_factory.mktemp("lanes") / "lanes.so"
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
    ]
    subprocess.run(
        [*command, "-I", str(ROOT / "csrc/include"), str(HERE / "lanes.cpp"), "-o", str(library)],
        check=True,
    )
    return ctypes.CDLL(str(library))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


Net = tuple[np.ndarray, ...]


def run(
    lanes: ctypes.CDLL, precision: str, net: Net, x: np.ndarray, truncates: bool = False
) -> np.ndarray:
    """Outputs (n, 2) of the lane program for normalised features x (n, 28 or 30)."""
    net = tuple(np.ascontiguousarray(part, np.float32) for part in net)
    x = np.ascontiguousarray(x, np.float32)
    out = np.full((len(x), 2), np.nan, np.float32)
    w1, b1, w2, b2, w3, b3 = (pointer(part) for part in net)
    stride = ctypes.c_int64(net[0].shape[1])
    n, extended = ctypes.c_int64(len(x)), int(x.shape[1] == 30)
    lanes.lanes_network(
        PARTS[precision],
        int(truncates),
        w1,
        stride,
        b1,
        w2,
        b2,
        w3,
        b3,
        n,
        extended,
        pointer(x),
        pointer(out),
    )
    return out


def plain(net: Net, x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The same in PyTorch; in float32 it is the path that the kernels are measured by."""
    w1, b1, w2, b2, w3, b3 = (
        torch.as_tensor(np.asarray(part, np.float32)).to(dtype) for part in net
    )
    h = torch.as_tensor(x).to(dtype)
    h = (h @ w1[:, : h.shape[1]].T + b1).relu()
    return ((h @ w2.T + b2).relu() @ w3.T + b3)[:, :2].numpy()


def random_net(rng: np.random.Generator, features: int, spread: float = 0.0) -> Net:
    """He-scaled weights; `spread` is the standard deviation of the logarithms of their rows'
    sizes.
    """

    def layer(rows: int, columns: int) -> np.ndarray:
        return (
            rng.normal(size=(rows, columns))
            * (2.0 / columns) ** 0.5
            * np.exp(spread * rng.normal(size=(rows, 1)))
        )

    return (
        layer(32, features),
        0.1 * rng.normal(size=32),
        layer(32, 32),
        0.1 * rng.normal(size=32),
        layer(2, 32),
        0.1 * rng.normal(size=2),
    )


def demo_net() -> Net:
    w = {name: t.numpy() for name, t in load_weights("demo", SMALL_FC).tensors.items()}
    time = np.tanh(
        100 / np.array([1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 1e4, 3e4, 1e5]) - 1
    )
    first = w["network.input.weight"]
    bias = w["network.input.bias"] + first[:, 28:] @ time
    return (
        first,
        bias,
        w["network.linear_0.weight"],
        w["network.linear_0.bias"],
        w["network.output.weight"],
        w["network.output.bias"],
    )


def features(rng: np.random.Generator, n: int, num: int, tail: float) -> np.ndarray:
    """Normalised features (n, num), with mean square 1; a larger `tail` makes most of them small
    and few very large.
    """
    x = rng.normal(size=(n, num)) * np.exp(tail * rng.normal(size=(n, num)))
    return x / np.sqrt((x * x).mean(0))


def relative(out: np.ndarray, exact: np.ndarray) -> float:
    """Relative L2 error of the update that the outputs make with AdafacLO's exp_mult."""
    update, want = (o[:, 0] * np.exp(0.001 * o[:, 1]) for o in (out.astype(np.float64), exact))
    return float(np.linalg.norm(update - want) / np.linalg.norm(want))


def test_every_feature_has_one_slot(lanes: ctypes.CDLL) -> None:
    for extended in (0, 1):
        slots = [
            lanes.lanes_feature_of_slot(extended, t, slot) for t in range(4) for slot in range(8)
        ]
        assert sorted(slot for slot in slots if slot >= 0) == list(range(30 if extended else 28))
        assert slots.count(-1) == (2 if extended else 4)


def test_float16_is_numpys(lanes: ctypes.CDLL) -> None:
    halves = np.arange(65536).astype(np.uint16)
    wide = np.empty(65536, np.float32)
    lanes.lanes_from_half(ctypes.c_int64(65536), pointer(halves), pointer(wide))
    want = halves.view(np.float16).astype(np.float32)
    number = ~np.isnan(want)
    assert np.isnan(wide[~number]).all()
    np.testing.assert_array_equal(wide[number].view(np.uint32), want[number].view(np.uint32))

    # every float16, the middles between two, and their neighbours; then random bits
    finite = np.sort(np.unique(wide[np.isfinite(wide)]).astype(np.float64))
    middles = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    edges = np.concatenate(
        [
            finite.astype(np.float32),
            middles,
            np.float32([65519.996, 65520.0, 1e30, np.inf, 2e-8, 1e-40]),
        ]
    )
    edges = np.concatenate(
        [edges, np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(-np.inf))]
    )
    bits = np.random.default_rng(1).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    for x in (edges, -edges, bits[~np.isnan(bits)]):
        x = np.ascontiguousarray(x)
        out = np.empty(len(x), np.uint16)
        lanes.lanes_to_half(ctypes.c_int64(len(x)), pointer(x), pointer(out))
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(out, x.astype(np.float16).view(np.uint16))


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("num", [28, 30])
def test_fragments_are_exact_on_small_integers(
    lanes: ctypes.CDLL, precision: str, num: int
) -> None:
    """Small integers lose nothing in float16 or in the sums: a fragment in the wrong place cannot
    hide in a tolerance.
    """
    rng = np.random.default_rng(2)

    def integers(*shape: int) -> np.ndarray:
        return rng.integers(-2, 3, shape).astype(np.float32)

    net = (
        integers(32, 39),
        integers(32),
        integers(32, 32) // 2,
        integers(32),
        integers(2, 32),
        integers(2),
    )
    x = integers(70, num)
    exact = plain(net, x, torch.float64)
    assert np.unique(exact).size > 50
    for truncates in (False, True):
        np.testing.assert_array_equal(run(lanes, precision, net, x, truncates), exact)


@pytest.mark.parametrize("truncates", [False, True], ids=["nearest", "truncating"])
@pytest.mark.parametrize("which", ["random", "random-spread", "demo"])
def test_precision(lanes: ctypes.CDLL, which: str, truncates: bool) -> None:
    """high: at most 4 times the error of the float32 path (relative L2 against float64); medium: at
    most 2e-3.
    """
    rng = np.random.default_rng(3)
    for tail in (0.0, 1.0, 2.0):
        num = 30 if which == "random" and tail == 1.0 else 28
        net = (
            demo_net()
            if which == "demo"
            else random_net(rng, num, spread=1.0 if which == "random-spread" else 0.0)
        )
        x = features(rng, 4096, num, tail)
        exact = plain(net, x, torch.float64)
        base = relative(plain(net, x, torch.float32), exact)
        high = relative(run(lanes, "high", net, x, truncates), exact)
        medium = relative(run(lanes, "medium", net, x, truncates), exact)
        print(
            f"{which} tail {tail:g}: float32 {base:.2e}, high {high:.2e} ({high / base:.2f} "
            f"times), medium {medium:.2e}"
        )
        assert high <= 4.0 * base, (high / base, tail)
        assert medium <= 2e-3, (medium, tail)


def test_an_outlier_does_not_overflow(lanes: ctypes.CDLL) -> None:
    """One gradient among 1e8 zeros has features of 1e4; activations beyond float16 saturate, in
    "high" at twice its largest.
    """
    rng = np.random.default_rng(4)
    net = random_net(rng, 28)
    x = np.zeros((16, 28))
    x[3] = 1e4 * rng.choice([-1.0, 1.0], 28)
    exact = plain(net, x, torch.float64)
    np.testing.assert_allclose(run(lanes, "high", net, x), exact, rtol=1e-5)
    np.testing.assert_allclose(run(lanes, "medium", net, x), exact, rtol=1e-2)
    x[3] *= 1e4
    for precision in PARTS:
        out = run(lanes, precision, net, x)
        assert np.isfinite(out).all()
        np.testing.assert_allclose(out[:3], exact[:3], rtol=2e-3)


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("truncates", [False, True], ids=["nearest", "truncating"])
def test_nan_stays_nan_and_in_its_element(
    lanes: ctypes.CDLL, precision: str, truncates: bool
) -> None:
    rng = np.random.default_rng(5)
    net = random_net(rng, 28)
    x = features(rng, 28 * 3, 28, 0.0)
    clean = run(lanes, precision, net, x, truncates)
    for feature in range(28):
        x[3 * feature + 1, feature] = np.nan
    out = run(lanes, precision, net, x, truncates)
    spoiled = np.arange(len(x)) % 3 == 1
    assert np.isnan(out[spoiled]).all()
    np.testing.assert_array_equal(out[~spoiled], clean[~spoiled])

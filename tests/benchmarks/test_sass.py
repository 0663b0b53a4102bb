"""The machine code of the CUDA passes is as it was measured: benchmarks/results/sass.json is of
these sources, and within what the passes may take. No compiler is needed: who changes csrc measures
anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sass

RESULT = json.loads(sass.RESULT.read_text())
# Warp instructions per 32 elements on sm_90.
MOST = {
    "A": 20.0,
    "B small_fc": 80.0,
    "B VeLO": 100.0,
    "B CELO2": 100.0,
    "C VeLO": 230.0,
    "C CELO2": 450.0,
    "C high": 760.0,
    "C medium": 400.0,
    "AdamW": 100.0,
    "C highest": 3500.0,
    "B small_fc, bfloat16": 70.0,
    "B VeLO, bfloat16": 88.0,
    "B CELO2, bfloat16": 76.0,
    "C VeLO, bfloat16": 250.0,
    "C CELO2, bfloat16": 410.0,
    "C high, bfloat16": 850.0,
    "C medium, bfloat16": 480.0,
    "C highest, bfloat16": 3600.0,
    "copy": 5.0,
}


def test_the_figures_are_of_these_sources() -> None:
    again = "measure again: python benchmarks/sass.py --record"
    assert RESULT["csrc"] == sass.digest(), again
    assert RESULT["before"]["csrc"] != RESULT["csrc"]


# Rows of the table in docs/kernels.md, and the passes whose numbers stand there.
TOLD = {
    "A": ("A",),
    "B, small_fc / VeLO": ("B small_fc", "B VeLO"),
    "C, VeLO / CELO2": ("C VeLO", "C CELO2"),
    "C, small_fc, high / medium": ("C high", "C medium"),
    "copy into a bucket": ("copy",),
    "AdamW": ("AdamW",),
}


def test_the_docs_tell_these_figures() -> None:
    """To the last digit that stands there."""
    text = (sass.CSRC.parent / "docs" / "kernels.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    told = {row[0].strip(): row[1:] for row in rows if len(row) == 4}
    now, before = RESULT["passes"]["90"], RESULT["before"]["passes"]["90"]
    for label, names in TOLD.items():
        columns = (before, ""), (now, ""), (now, sass.HALVED)
        for cell, (passes, suffix) in zip(told[label], columns, strict=True):
            numbers = cell.strip().split(" / ")
            if numbers in ([""], ["the same"], ["not counted"]):
                continue
            for number, name in zip(numbers, names, strict=True):
                unit = 0.1 if "." in number else 1.0
                found = passes[name + suffix]["instructions"]
                assert float(number) == pytest.approx(found, abs=0.51 * unit), (label, name)


# What the extension is built for, and sm_89, which runs the code of sm_80.
BUILT = ("80", "89", "90", "100")
# Bytes that are spilled all the same, before and after the loop over elements.
OUTSIDE = {("100", "C high, bfloat16"): 68}


@pytest.mark.parametrize("name", sass.PASSES)
def test_a_pass_takes_no_more_than_it_may(name: str) -> None:
    for arch in BUILT:
        row = RESULT["passes"][arch][name]
        assert row["spilled"] == OUTSIDE.get((arch, name), 0), arch
        assert "spill" not in row["by class"], arch
        assert sum(row["by class"].values()) == pytest.approx(row["instructions"], abs=0.2), arch
    assert RESULT["passes"]["90"][name]["instructions"] <= MOST[name]


@pytest.mark.parametrize("arch", ["89", "120"])
def test_a_card_that_is_slow_in_double_has_none_over_elements(arch: str) -> None:
    """But for pass A, which adds up four rows of a warp in it: 15 instructions for 16 x 32."""
    for name, row in RESULT["passes"][arch].items():
        most = 1.0 if name == "A" else 0.0
        assert row["by class"].get("FP64", 0.0) <= most, name


IN_FOURS = [name for name in sass.PASSES if not name.startswith("C highest")]


@pytest.mark.parametrize("name", IN_FOURS)
def test_elements_come_four_at_a_time(name: str) -> None:
    """Means of 16 bits in 64 bits. Tensor cores: beside them the element that a lane moves comes
    and goes alone.
    """
    wanted = {"LDG.128"}
    if name.endswith(sass.HALVED):
        wanted.add("LDG.64")
    elif name in ("C high", "C medium"):
        wanted.add("LDG.32")
    for arch in BUILT:
        accesses = RESULT["passes"][arch][name]["accesses"]
        assert {k for k in accesses if k.startswith("LDG")} == wanted, arch


@pytest.mark.parametrize("name", IN_FOURS)
def test_the_bytes_of_an_element_are_those_of_its_accesses(name: str) -> None:
    """Tensor cores: four lanes read some of the same, so that there are more."""
    for arch in BUILT:
        row = RESULT["passes"][arch][name]
        counts = {k: v for k, v in row["accesses"].items() if name != "A" or k.startswith("LDG")}
        moved = sum(int(k.split(".")[1]) / 8 * count for k, count in counts.items())
        if name.removesuffix(sass.HALVED) in ("C high", "C medium"):
            assert moved > row["bytes per element"], arch
        else:
            assert moved == row["bytes per element"], arch


def test_state_in_bfloat16_moves_two_thirds() -> None:
    """Of passes B and C, then with A."""
    for rule in ("VeLO", "CELO2", "high", "medium"):
        for name, with_a in ((rule, 72), (rule + sass.HALVED, 48)):
            _, *others = sass.RULES[name]
            assert sum(sass.PASSES[p].bytes for p in others) == with_a - 4
            assert sum(sass.PASSES[p].bytes for p in sass.RULES[name]) == with_a


LISTING = """
.text._ZN9pylo_dist3gpu11some_kernelILi3EEEvv:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
	//## File "{file}", line 1
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
	//## File "{file}", line 2
        /*0030*/                   DADD R8, R8, R4 ;
.L_x_2:
	//## File "{file}", line 3
        /*0040*/                   FFMA R4, R4, R5, R6 ;
        /*0050*/               @P1 BRA `(.L_x_3) ;
	//## File "{file}", line 1
        /*0060*/               @P2 BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   EXIT ;
"""


@pytest.mark.parametrize(("never", "opcodes"), [((), 6), (("rare",), 5)])
def test_a_turn_stays_in_the_loop(never: tuple[str, ...], opcodes: int, tmp_path: Path) -> None:
    """It falls through, but for where that leads out or to what is rare."""
    source = tmp_path / "some.cu"
    source.write_text("for (each)\nrare\nusual\n")
    kernels = sass.parse(LISTING.format(file=source))
    turn = sass.walk(kernels["some_kernel 3"], sass.Loop("", "for (each)", 1, never=never))
    assert len(turn) == opcodes
    assert sass.whole(turn) == 1
    with pytest.raises(sass.Unwalkable, match="other"):
        sass.walk(kernels["some_kernel 3"], sass.Loop("", "other", 1))

"""The campaign sees the faults it is there for, and a short part of it finds none."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import campaign
import pytest
from campaign import Journal, Part
from outcomes import BARE, DIED, RIGHT, WAITS, Case, Outcome

ROOT = Path(__file__).parents[2]
# Parts and how many of each: those of the suite. A fault here is had again by --only PART:NUMBER.
SHORT = {
    "checkpoints": 60,
    "weights": 60,
    "hub": 4,
    "constructors": 40,
    "command lines": 100,
    "JSON": 60,
    "faults": 8,
}


def prepared(folder: Path) -> Case:
    (folder / "once").touch()

    def case(rng: random.Random, own: Path) -> Outcome:
        assert (folder / "once").exists()
        assert not list(own.iterdir())  # of each case its own
        (own / "file").touch()
        number = rng.randrange(1000)
        if number < 100:
            raise KeyError("of the campaign")
        if number < 200:
            os._exit(7)
        if number < 300:
            time.sleep(60)
        return Outcome(RIGHT, str(number))

    return case


def test_every_case_has_an_outcome_whatever_becomes_of_its_process(tmp_path: Path) -> None:
    part = Part("drill", 30, prepared, limit_s=3.0)
    journal = Journal(tmp_path / "journal")
    campaign.campaign([(part, 10)], 0, tmp_path / "a", journal)
    journal = Journal(tmp_path / "journal")  # as after a kill
    campaign.campaign([(part, 16)], 0, tmp_path / "b", journal)
    found = journal.outcomes["drill"]
    assert sorted(found) == list(range(16))
    for number, outcome in found.items():
        drew = campaign.drawn(0, "drill", number).randrange(1000)
        wanted = BARE if drew < 100 else DIED if drew < 200 else WAITS if drew < 300 else RIGHT
        assert outcome.kind == wanted, (number, drew, outcome)
    assert {outcome.kind for outcome in found.values()} == {BARE, DIED, WAITS, RIGHT}
    assert "exit code 7" in next(o.said for o in found.values() if o.kind == DIED)
    assert "test_campaign.py:case" in next(o.where for o in found.values() if o.kind == WAITS)
    row = journal.rows()["drill"]
    assert row["tried"] == 16 == row["right"] + sum(row["faults"].values())
    assert sum(kind["count"] for kind in journal.kinds()) == 16 - row["right"]
    lines = (tmp_path / "journal").read_text().splitlines()
    assert len([line for line in lines if '"number"' in line]) == 16  # none twice


def test_a_whole_campaign_is_large_enough() -> None:
    cases = {part.name: part.cases for part in campaign.parts()}
    assert cases["checkpoints"] + cases["weights"] >= 10_000
    assert cases["faults"] >= 200


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("campaign") / "out.json"
    words = [word for part, count in SHORT.items() for word in ("--part", f"{part}:{count}")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "campaign.py"), *words, "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.is_file(), done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_a_short_campaign_finds_nothing(short: dict[str, Any]) -> None:
    assert {name: row["tried"] for name, row in short["parts"].items()} == SHORT
    assert short["kinds_of_faults"] == []
    assert len(short["commit"]) == 40
    assert short["versions"]["torch"]

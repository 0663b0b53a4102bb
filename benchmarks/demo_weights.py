"""Write pylo_dist/data/demo_small_fc.safetensors: hand-made weights of small_fc_lopt, from the
table of constants below.

The 39 -> 32 -> 32 -> 2 network is wired by hand; nothing in it was trained. With the 28 normalised
features f and the 11 time features of an element it computes

    x  = sum of MIX[i] f_i                         direction: where the factored momentum and
                                                   gradient point
    o0 = GAIN (x, bent to a slope of 1 - BEND beyond +-KNEE)
    o1 = 1000 (log of the schedule)                depends on the step alone; exp_mult = 0.001 takes
                                                   the 1000 back

so that AdafacLO's update is lr * step_mult * o0 * schedule(t). A signed number passes a ReLU layer
as relu(x) - relu(-x), the bend is a second such pair shifted by KNEE, and a time feature passes
because it is lifted above zero first. 15 of 32 units are used in the first hidden layer, 13 in the
second; all other weights are zero.

    python benchmarks/demo_weights.py               write the file and print its card
    python benchmarks/demo_weights.py --check       exit 1 if the file in the tree differs by a byte
    python benchmarks/demo_weights.py --calibrate   repeat the sweep that the constants were chosen
                                                    by (see --help)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from pylo_dist.maths.reference import TIME_SCALES
from pylo_dist.optim.adafac import ARCHITECTURE as SMALL_FC
from pylo_dist.weights import CARD_KEY

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "pylo_dist" / "data" / "demo_small_fc.safetensors"

# Indices of the features used, see SMALL_FC's order in pylo_dist/maths/reference.py.
FACTORED_GRAD = 10  # gradient over Adafactor's factored root mean square, decay 0.9
FACTORED_MOMENTUM = 25  # momentum 0.9 over the same
# momentum 0.9 over Adam's root mean square, decay 0.999; tried in the calibration, unused
ADAM_MOMENTUM = 6

TANH_1 = 0.7615941559557649  # time features lie between -tanh(1), at step 0 for most, and 1
LOG_UNIT = 1000.0  # 1 / exp_mult


@dataclass(frozen=True, slots=True)
class Constants:
    """All numbers of the demo weights. What each was compared with is in `VARIANTS`."""

    # The momentum steers, some of the raw gradient makes it look ahead as Nesterov's does. Adam's
    # momentum is left out: with gradients below 1e-3 its epsilon (1e-6 beside v) takes over and
    # small gradients lose their say.
    mix: Mapping[int, float] = field(
        default_factory=lambda: {FACTORED_MOMENTUM: 0.7, FACTORED_GRAD: 0.3}
    )
    # x has a root mean square of about 1 in every tensor. Beyond the knee a quarter of it counts,
    # so that a rare large entry does not throw its parameter.
    knee: float = 3.0
    bend: float = 0.75
    # Root mean square of a step where the schedule is 1, in units of lr * step_mult (0.01). Chosen
    # on 128 channels, where twice as much loses 0.08 nats; the best step falls with the width: a
    # model of 64 channels gains 0.16 nats from four times it.
    gain: float = 0.16
    # log of the schedule: the first is where it starts, the others are what each time scale (in
    # steps) adds by the time it has passed. Up from e^-2 in some 60 steps, then down by a factor
    # for each half decade.
    start: float = -2.0
    schedule: Mapping[float, float] = field(
        default_factory=lambda: {
            30.0: 2.0,
            100.0: -0.7,
            300.0: -0.7,
            1000.0: -0.7,
            3000.0: -0.6,
            1e4: -0.6,
            3e4: -0.6,
            1e5: -0.6,
        }
    )


CARD: dict[str, Any] = {
    "name": "demo_small_fc",
    "architecture": "small_fc",
    "made": "hand-made and calibrated, not meta-trained; benchmarks/demo_weights.py reproduces the "
    "file to the byte",
    "decays": {
        "momentum_decays": [0.0, 0.0, 0.0],
        "rms_decays": [0.0],
        "adafactor_decays": [0.0, 0.0, 0.0],
    },
    "calibrated_on": "byte-level GPT-2 of 0.14 and 0.84 million parameters, batches of 2048 bytes",
    "calibrated_horizon_steps": 300,
    "beyond_the_horizon": "the step about halves per factor of 3 in time up to 10^5 steps, and "
    "never grows again; tried to 3300",
    "good_for": "trying the library end to end on small byte-level transformers",
    "not_good_for": "GPT-2 sized models and gradients, convolutional networks, anything in earnest",
    "licence": "Apache-2.0",
}


def build(constants: Constants) -> dict[str, Tensor]:
    """The six tensors of the network, float32, in the order of SMALL_FC."""
    tensors = {
        name: torch.zeros(shape, dtype=torch.float64) for name, shape in SMALL_FC.shapes.items()
    }
    first, first_bias, second, _, output, output_bias = tensors.values()
    num_features = first.shape[1] - len(TIME_SCALES)

    # First layer, units 0-3: x, -x, x - knee, -x - knee, each through ReLU.
    for unit, sign in enumerate((1.0, -1.0, 1.0, -1.0)):
        for feature, weight in constants.mix.items():
            first[unit, feature] = sign * weight
    first_bias[2:4] = -constants.knee
    # Second layer, units 0 and 1: the bent positive and negative part of x.
    for unit in (0, 1):
        second[unit, unit] = 1.0
        second[unit, unit + 2] = -constants.bend
    output[0, 0], output[0, 1] = constants.gain, -constants.gain

    # Units 4-14 carry the time features through both layers, lifted to 0 ... 1 + tanh(1).
    for i, scale in enumerate(TIME_SCALES):
        first[4 + i, num_features + i] = 1.0
        first_bias[4 + i] = TANH_1
        second[4 + i, 4 + i] = 1.0
        output[1, 4 + i] = LOG_UNIT * constants.schedule.get(scale, 0.0) / (1.0 + TANH_1)
    output_bias[1] = LOG_UNIT * constants.start
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}


def file_bytes(constants: Constants) -> bytes:
    """The .safetensors file. One metadata key only: safetensors sorts tensors but keeps metadata in
    a map without an order.
    """
    return save(build(constants), {CARD_KEY: json.dumps(CARD, sort_keys=True)})


def multipliers(constants: Constants, steps: list[int]) -> list[float]:
    """What the schedule multiplies the step by after `steps` steps, computed from the table and not
    by the network.
    """
    t = torch.tensor(steps, dtype=torch.float64)
    log = torch.full_like(t, constants.start)
    for scale, change in constants.schedule.items():
        log += change * (torch.tanh(t / scale - 1.0) + TANH_1) / (1.0 + TANH_1)
    return [float(x) for x in log.exp()]


# -------------------------------------------------------------------------------------- calibration

CALIBRATION_SEEDS = (100, 101)  # not those of bench_demo.py
DEFAULT = Constants()


def _scaled(factor: float) -> Constants:
    return replace(DEFAULT, gain=factor * DEFAULT.gain)


def _decay(each: float, scales: tuple[float, ...] = (100.0, 300.0, 1000.0)) -> Constants:
    return replace(DEFAULT, schedule={**DEFAULT.schedule, **dict.fromkeys(scales, each)})


# One constant changed at a time.
VARIANTS: dict[str, Constants] = {
    "as shipped": DEFAULT,
    "step x 0.25": _scaled(0.25),
    "step x 0.5": _scaled(0.5),
    "step x 2": _scaled(2.0),
    "step x 4": _scaled(4.0),
    "decay 0.4 per half decade": _decay(-0.4),
    "decay 1.0 per half decade": _decay(-1.0),
    "warm-up 3 times shorter": replace(
        DEFAULT, schedule={**DEFAULT.schedule, 30.0: 0.0, 10.0: 2.0}
    ),
    "momentum alone": replace(DEFAULT, mix={FACTORED_MOMENTUM: 1.0}),
    "half gradient": replace(DEFAULT, mix={FACTORED_MOMENTUM: 0.5, FACTORED_GRAD: 0.5}),
    "Adam's momentum alone": replace(DEFAULT, mix={ADAM_MOMENTUM: 1.0}),
    "half Adam's momentum": replace(DEFAULT, mix={FACTORED_MOMENTUM: 0.5, ADAM_MOMENTUM: 0.5}),
    "bent at 1": replace(DEFAULT, knee=1.0),
    "not bent": replace(DEFAULT, bend=0.0),
}


def calibrate(preset: str, steps: int, seeds: tuple[int, ...]) -> None:
    """Train the model of `preset` with every variant and print the validation losses in nats per
    byte.
    """
    import bench_demo

    lines = [["variant", *(f"seed {seed}" for seed in seeds), "mean"]]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "variant.safetensors"
        for name, constants in VARIANTS.items():
            file.write_bytes(file_bytes(constants))
            settings = {**bench_demo.SETTINGS, "preset": preset, "steps": steps}
            runs = [
                bench_demo.run_once(**settings, optimizer="adafaclo", weights=file, seed=seed)
                for seed in seeds
            ]
            losses = [run.final for run in runs]
            lines.append([name, *(f"{loss:.3f}" for loss in losses), f"{mean(losses):.3f}"])
            seconds = mean(run.cpu_seconds for run in runs)
            print(
                f"{name}: {mean(losses):.3f}, {seconds:.0f} CPU-s a run",
                file=sys.stderr,
                flush=True,
            )
    print(bench_demo.markdown(lines))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write, check or calibrate the demo weights.")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--check", action="store_true", help="exit 1 if the file in the tree differs by a byte"
    )
    mode.add_argument(
        "--calibrate",
        action="store_true",
        help="train with every variant; on one CPU core 15 s a run for nano",
    )
    parser.add_argument(
        "--preset", choices=("nano", "micro"), default="micro", help="model of --calibrate"
    )
    parser.add_argument(
        "--steps", type=int, default=CARD["calibrated_horizon_steps"], help="of --calibrate"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=CALIBRATION_SEEDS, help="of --calibrate"
    )
    args = parser.parse_args(argv)
    if args.calibrate:
        calibrate(args.preset, args.steps, tuple(args.seeds))
        return 0
    wanted = file_bytes(DEFAULT)
    if args.check:
        same = TARGET.is_file() and TARGET.read_bytes() == wanted
        print(f"{TARGET} {'is' if same else 'is NOT'} what this script writes")
        return 0 if same else 1
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_bytes(wanted)
    print(f"wrote {TARGET}, {len(wanted)} bytes")
    for key, value in CARD.items():
        print(f"  {key}: {value}")
    print("  schedule after as many steps:")
    steps = [0, 3, 10, 20, 30, 100, 300, 1000, 3000, 10_000, 100_000, 1_000_000]
    for step, multiplier in zip(steps, multipliers(DEFAULT, steps), strict=True):
        print(f"    {step:>9,} {multiplier:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

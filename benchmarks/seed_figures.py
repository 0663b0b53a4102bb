"""The figures a learned optimizer's backend is judged by; write results/seed_figures_<device>.json.

    python benchmarks/seed_figures.py --pylo ../pylo                # a CPU takes parts of the
                                                                    # models, a GPU all of them
    torchrun --nproc_per_node=8 benchmarks/seed_figures.py --sections sharded

    vit        forward, backward and optimizer of ViT-B/16 by batch size
    layer      one 1000 x 1000 layer: time of a step and launches; plain PyTorch, the compiled
               passes, PyLO
    gpt2       the optimizer's step by GPT-2 size
    sharded    the step on several ranks, ours and others, see sharded_step.py
    jax        the step on one device, ours and google/learned_optimization's, where that is
               installed

On a CPU times are CPU time of one thread, on a GPU those between device events; contenders take
turns, medians. A launch on a CPU is an operator that called no other one and did more than look at
memory; on a GPU a kernel. (On a CPU our plain PyTorch goes through a tensor in chunks of 16384
elements, so that a large one takes thousands.) Meta-weights are random of the published sizes,
where they are not the demo's: they cost what learned ones do.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import sharded_step
import torch
from bench_step import Contender, ours, pylo_makers, transformer
from record import RESULTS, environment, markdown, write
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from trainees import Stopwatch, on_ranks, optimizer_of

import pylo_dist
from pylo_dist.maths import compiled

SECTIONS = ("vit", "layer", "gpt2", "sharded", "jax")
OPTIMIZERS = ("AdafacLO", "VeLO", "AdamW")
# width, blocks
GPT2 = {"124m": (768, 12), "355m": (1024, 24), "774m": (1280, 36), "1.5b": (1600, 48)}
# operators that only look at memory or make it, and launch nothing
LOOKS = {
    *(
        "alias",
        "as_strided",
        "broadcast_to",
        "chunk",
        "detach",
        "detach_",
        "diagonal",
        "empty",
        "empty_like",
        "empty_strided",
    ),
    *(
        "expand",
        "expand_as",
        "flatten",
        "lift_fresh",
        "movedim",
        "narrow",
        "new_empty",
        "numpy_T",
        "permute",
        "resize_",
        "reshape",
    ),
    *(
        "result_type",
        "select",
        "set_",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "to",
        "transpose",
        "unbind",
        "unfold",
    ),
    *(
        "unsqueeze",
        "view",
        "view_as",
        "_reshape_alias",
        "_unsafe_view",
        "is_nonzero",
        "item",
        "_local_scalar_dense",
    ),
}


# ---------------------------------------------------------------------------------------------- ViT


class ViT(nn.Module):
    """A vision transformer: images (B, channels, size, size) to logits (B, classes).

    With the defaults it is ViT-B/16, 86,567,656 parameters.
    """

    def __init__(
        self,
        width: int = 768,
        blocks: int = 12,
        heads: int = 12,
        *,
        size: int = 224,
        patch: int = 16,
        channels: int = 3,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                heads,
                4 * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(len(x), -1, -1), x), dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


def vit(device: torch.device, blocks: int, batches: Sequence[int], rounds: int) -> dict[str, Any]:
    """Milliseconds of forward, backward and the steps of all optimizers, by batch size. One model,
    one optimizer at a time.
    """
    torch.manual_seed(0)
    model, watch = ViT(blocks=blocks).to(device), Stopwatch(device)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    rows: dict[str, dict[str, Any]] = {str(batch): {} for batch in batches}
    for name in OPTIMIZERS:
        model.load_state_dict(start)
        kind, arguments = optimizer_of(name)
        optimizer = kind(model.named_parameters(), **arguments)
        for batch in batches:
            images = torch.randn(
                batch, 3, 224, 224, generator=torch.Generator().manual_seed(batch)
            ).to(device)
            labels = torch.arange(batch, device=device) % 1000
            taken: dict[str, list[float]] = {"forward": [], "backward": [], "step": []}
            for _ in range(rounds + 1):  # the first allocates
                watch.start()
                loss = nn.functional.cross_entropy(model(images), labels)
                taken["forward"].append(watch.stop()[1])
                watch.start()
                loss.backward()
                taken["backward"].append(watch.stop()[1])
                watch.start()
                optimizer.step(
                    *((loss.detach(),) if isinstance(optimizer, pylo_dist.LearnedOptimizer) else ())
                )
                taken["step"].append(watch.stop()[1])
                optimizer.zero_grad()
            rows[str(batch)][name] = {
                part: round(1e3 * median(seconds[1:]), 3) for part, seconds in taken.items()
            }
        del optimizer
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "model": f"ViT-B/16, {blocks} of 12 blocks",
        "parameters": parameters,
        "ms_by_batch": rows,
    }


# -------------------------------------------------------------------------------------------- layer


def launches_on_cpu(step: Callable[[], Any]) -> int:
    """Operators of a step that called no other one, those that only look at memory left out."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = [e for e in profiler.events() if e.name.startswith(("aten::", "pylo_dist::"))]
    return sum(
        not any(child.name.startswith(("aten::", "pylo_dist::")) for child in event.cpu_children)
        and event.name.split("::")[1] not in LOOKS
        for event in events
    )


def layer(device: torch.device, rounds: int, pylo: str | None) -> dict[str, Any]:
    """One 1000 x 1000 tensor: ms of a step and launches."""
    shapes = [(1000, 1000)]
    makers: dict[str, Callable[[], Contender]] = {}
    for rule in ("small_fc", "velo"):
        makers[f"{rule}, compiled passes"] = partial(
            Contender, rule, shapes, device.type, ours(rule)
        )
        makers[f"{rule}, plain PyTorch"] = partial(
            Contender, rule, shapes, device.type, ours(rule), kernels=False
        )
    for rule, make in (pylo_makers(pylo) if pylo else {}).items():
        makers[f"{rule}, PyLO naive"] = partial(Contender, rule, shapes, device.type, make)
    makers["AdamW fused"] = partial(
        Contender,
        "AdamW",
        shapes,
        device.type,
        lambda params: torch.optim.AdamW(params, fused=True),
    )
    makers["AdamW foreach"] = partial(
        Contender,
        "AdamW",
        shapes,
        device.type,
        lambda params: torch.optim.AdamW(params, foreach=True),
    )
    entries = {name: make() for name, make in makers.items()}
    for entry in entries.values():
        entry.step()
    for _ in range(rounds):
        for entry in entries.values():
            entry.measure()
    rows = {}
    for name, entry in entries.items():
        launches = entry.row()["launches"] if device.type == "cuda" else launches_on_cpu(entry.step)
        rows[name] = {
            "step_ms": round(1e3 * median(entry.seconds["step"]), 4),
            "launches": launches,
        }
    absent = {} if pylo else {"PyLO naive": "no folder with PyLO's source was named (--pylo)"}
    return {"paths": compiled.paths(), "rows": rows, "absent": absent}


# -------------------------------------------------------------------------------------------- GPT-2


def gpt2(device: torch.device, blocks: int | None, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step by GPT-2 size. `blocks`: so many of each and no token embedding; the
    whole is then computed.
    """
    sizes = {}
    for model, (width, all_blocks) in GPT2.items():
        shapes = transformer(width, blocks or all_blocks, 1024, 0 if blocks else 50257)
        whole = sum(math.prod(shape) for shape in transformer(width, all_blocks, 1024, 50257))

        def make(name: str, params: Any) -> Any:
            kind, arguments = optimizer_of(name)
            return kind(params, **arguments)

        entries = {
            name: Contender(name, shapes, device.type, partial(make, name)) for name in OPTIMIZERS
        }
        for entry in entries.values():
            entry.step()
        for _ in range(rounds):
            for entry in entries.values():
                entry.measure()
        numel = sum(math.prod(shape) for shape in shapes)
        rows = {}
        for name, entry in entries.items():
            seconds = median(entry.seconds["step"])
            rows[name] = {
                "step_ms": round(1e3 * seconds, 3),
                "ns_per_parameter": round(1e9 * seconds / numel, 3),
                "whole_model_ms": round(1e3 * seconds * whole / numel, 1),
                "whole_model_is_computed": blocks is not None,
            }
        sizes[model] = {"parameters": whole, "measured_parameters": numel, "rows": rows}
        del entries
    return sizes


# ------------------------------------------------------------------------------------------ results


def settings_of(args: argparse.Namespace) -> sharded_step.Settings:
    return sharded_step.Settings(args.width, args.sharded_blocks, args.rounds, dion=args.dion)


def sharded(args: argparse.Namespace) -> dict[str, Any] | None:
    """All runs of sharded_step.py; None on torchrun's ranks other than the first."""
    cases = [settings_of(args)]
    if args.pylo:
        cases.append(cases[0].beside_pylo(args.pylo))
    runs = [
        sharded_step.summarize(world, [of_cases[i] for of_cases in per_rank], case)
        for world, per_rank in on_ranks(args.ranks, sharded_step.measure_runs, cases)
        for i, case in enumerate(cases)
    ]
    if not runs:
        return None
    return {"runs": runs, "balance": sharded_step.computed_balance()}


def tables(result: dict[str, Any]) -> str:
    found = []
    if "vit" in result:
        lines = [
            [
                "batch",
                "forward, ms",
                "backward, ms",
                *(f"step of {name}, ms" for name in OPTIMIZERS),
            ]
        ]
        for batch, rows in result["vit"]["ms_by_batch"].items():
            parts = [
                median(rows[name][part] for name in OPTIMIZERS) for part in ("forward", "backward")
            ]
            lines.append(
                [
                    batch,
                    *(f"{ms:.1f}" for ms in (*parts, *(rows[name]["step"] for name in OPTIMIZERS))),
                ]
            )
        found.append(f"### {result['vit']['model']}\n\n{markdown(lines)}")
    if "layer" in result:
        lines = [["1000 x 1000", "step, ms", "launches"]]
        lines += [
            [name, f"{row['step_ms']:.2f}", str(row["launches"])]
            for name, row in result["layer"]["rows"].items()
        ]
        found.append(markdown(lines))
    if "gpt2" in result:
        lines = [["GPT-2", "parameters", *(f"{name}: ns per parameter, ms" for name in OPTIMIZERS)]]
        for model, size in result["gpt2"].items():
            cells = [
                f"{size['rows'][n]['ns_per_parameter']:.2f}, "
                f"{size['rows'][n]['whole_model_ms']:,.0f}"
                for n in OPTIMIZERS
            ]
            lines.append([model, f"{size['parameters']:,}", *cells])
        found.append(markdown(lines))
    found += [sharded_step.table(run) for run in (result.get("sharded") or {}).get("runs", ())]
    if "rows" in result.get("jax", {}):
        found.append(sharded_step.jax_table(result["jax"]))
    return "\n\n".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="The figures a learned optimizer's backend is judged by."
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--pylo", help="folder with PyLO's source")
    parser.add_argument("--dion", help="folder with the source of microsoft/dion")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--blocks", type=int, help="of ViT-B/16's 12; default: 12 on a GPU, 2 on a CPU"
    )
    parser.add_argument(
        "--gpt2-blocks", type=int, help="of every GPT-2; default: all on a GPU, 1 on a CPU"
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", help="of ViT; default: 1 4 16 on a CPU, 1 to 256 on a GPU"
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[2, 4], help="of the sharded step, without torchrun"
    )
    parser.add_argument(
        "--width", type=int, default=256, help="of the transformer of the sharded step"
    )
    parser.add_argument("--sharded-blocks", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and batches")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "RANK" in os.environ and args.sections != ["sharded"]:
        parser.error("under torchrun: --sections sharded; the others are of one device")
    device, on_cpu = torch.device(args.device), args.device == "cpu"
    if args.quick:
        args.rounds = min(args.rounds, 3)
    batches = args.batches or (
        (1, 4) if args.quick else (1, 4, 16) if on_cpu else (1, 4, 16, 64, 256)
    )
    found = environment()
    result: dict[str, Any] = {
        "what": "figures of optimizer steps, "
        f"{'CPU time of one thread' if on_cpu else 'device time'}; see seed_figures.py",
        **found,
        "quick": args.quick,
        "device": args.device if on_cpu else torch.cuda.get_device_name(),
        "rounds": args.rounds,
    }
    sections: dict[str, Callable[[], Any]] = {
        "vit": lambda: vit(device, args.blocks or (2 if on_cpu else 12), batches, args.rounds),
        "layer": lambda: layer(device, args.rounds, args.pylo),
        "gpt2": lambda: gpt2(device, args.gpt2_blocks or (1 if on_cpu else None), args.rounds),
        "sharded": lambda: sharded(args),
        "jax": lambda: sharded_step.jax_row(settings_of(args).shapes(), args.rounds),
    }
    for name in args.sections:
        result[name] = sections[name]()
        print(f"{name}: done", file=sys.stderr, flush=True)
    if os.environ.get("RANK", "0") != "0":
        return 0
    write(result, args.out or RESULTS / f"seed_figures_{args.device}.json")
    print(tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

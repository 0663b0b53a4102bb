"""What people use beside an optimizer: averages of the model, adapters (LoRA), float8, quantised
parameters, files in the format of Hugging Face. Each trains as in one process, or is refused by
name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pylo_dist
from support.golden import velo_weights
from support.optimizers import small_fc
from support.ranks import run_ranks
from support.sharded_model import snapshot

RANKS, STEPS = 2, 3
LAYOUTS = ("zero1", "zero2", "fsdp2")
FACES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdafacLO": (pylo_dist.AdafacLO, {"weights": small_fc()}),
    "VeLO": (pylo_dist.VeLO, {"weights": velo_weights("small"), "num_steps": STEPS}),
}


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


def lora() -> nn.Module:
    """A frozen GPT-2 with adapters of rank 3, and one norm that is trained whole."""
    import peft
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 53, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    same = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    tokens = {"bos_token_id": None, "eos_token_id": None}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **same, **tokens))
    config = peft.LoraConfig(
        r=3, target_modules=["c_attn", "c_proj"], modules_to_save=["ln_f"], fan_in_fan_out=True
    )
    return peft.get_peft_model(base, config)  # type: ignore[no-any-return]


def float8(gather: bool = False) -> nn.Module:
    """Linear layers that compute in float8, emulated."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(emulate=True, enable_fsdp_float8_all_gather=gather)
    return convert_to_float8_training(plain(), config=config)


def float8_gather() -> nn.Module:
    """The same for FSDP2 that sends float8; parameters are of a class of torchao's."""
    return float8(gather=True)


MODELS: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f for f in (plain, lora, float8, float8_gather)
}
CASES = {
    "plain": (("zero1", "AdafacLO"), ("zero2", "AdafacLO"), ("fsdp2", "AdafacLO")),
    "lora": tuple((layout, face) for layout in LAYOUTS for face in FACES),
    "float8": tuple((layout, "AdafacLO") for layout in LAYOUTS),
    "float8_gather": (("fsdp2", "AdafacLO"),),
}


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    if isinstance(model, nn.Sequential):
        loss: Tensor = model(torch.randn(16, 16, generator=generator)).square().mean()
        return loss
    tokens = torch.randint(53, (2, 8), generator=generator)
    return model(input_ids=tokens, labels=tokens).loss  # type: ignore[no-any-return]


def averages_of(model: nn.Module) -> dict[str, AveragedModel]:
    return {
        "mean": AveragedModel(model),
        "exponential": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    }


def shard(model: nn.Module) -> nn.Module:
    """Blocks of the model in units of their own (modified in place)."""
    kind = "Linear" if isinstance(model, nn.Sequential) else "GPT2Block"
    for module in list(model.modules()):
        if type(module).__name__.endswith(kind):
            fully_shard(module)
    return fully_shard(model)


def build(layout: str, face: str, model: nn.Module) -> Any:
    """Shard the model for this layout, and its optimizer."""
    optimizer_class, arguments = FACES[face]
    if layout.startswith("zero"):
        return pylo_dist.ZeroOptimizer(model, optimizer_class, stage=int(layout[-1]), **arguments)
    return optimizer_class(shard(model).named_parameters(), **arguments)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Whole parameters as plain tensors; collective where they are sharded."""
    return {fqn: getattr(p, "_tensor", p) for fqn, p in snapshot(model).items()}


def train(name: str, layout: str, face: str, rank: int, folder: str) -> dict[str, Any]:
    """The parameters after STEPS steps; of the plain model also those of its averages, and what a
    folder in the format of Hugging Face brings back.
    """
    model = MODELS[name]()
    averages = averages_of(model) if name == "plain" else {}
    if layout == "fsdp2":
        for average in averages.values():  # torch copies no model that is sharded
            shard(average.module)
    optimizer = build(layout, face, model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, step, rank)
        loss.backward()
        optimizer.step(loss)
        for average in averages.values():
            average.update_parameters(model)
    found = {"model": whole(model), **{key: whole(a.module) for key, a in averages.items()}}
    if name == "plain":
        writer = HuggingFaceStorageWriter(f"{folder}/{layout}", save_distributed=True)
        dcp.save(model.state_dict(), storage_writer=writer)
        other = plain()
        nn.init.zeros_(other[0].weight)  # type: ignore[index, arg-type]
        build(layout, face, other)
        state = other.state_dict()
        dcp.load(state, storage_reader=HuggingFaceStorageReader(f"{folder}/{layout}"))
        other.load_state_dict(state)
        found["stored"] = whole(other)
    return found


def ranks(rank: int, world: int, names: tuple[str, ...], folder: str) -> dict[Any, Any]:
    return {
        (name, layout, face): train(name, layout, face, rank, folder)
        for name in names
        for layout, face in CASES[name]
    }


def unsharded(name: str, face: str) -> dict[str, dict[str, Tensor]]:
    """The same in one process."""
    # what FSDP2 sends as float8 is rounded as the layer itself would
    model = MODELS["float8" if name == "float8_gather" else name]()
    averages = averages_of(model) if name == "plain" else {}
    optimizer_class, arguments = FACES[face]
    optimizer = optimizer_class(model.named_parameters(), **arguments)
    for step in range(STEPS):
        losses, gradients = [], []
        for rank in range(RANKS):
            optimizer.zero_grad()
            loss = loss_of(model, step, rank)
            loss.backward()
            losses.append(loss.detach().double())
            gradients.append([p.grad for p in model.parameters()])
        for p, a, b in zip(model.parameters(), *gradients, strict=True):
            p.grad = None if a is None or b is None else (a + b) / RANKS
        optimizer.step(sum(losses) / RANKS)
        for average in averages.values():
            average.update_parameters(model)
    found = {"model": whole(model), **{key: whole(a.module) for key, a in averages.items()}}
    return {**found, **({"stored": found["model"]} if name == "plain" else {})}


def check(*names: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = run_ranks(RANKS, ranks, names, folder)
    for name in names:
        truths = {face: unsharded(name, face) for _, face in CASES[name]}
        start = whole(MODELS[name]())
        for layout, face in CASES[name]:
            truth = truths[face]
            for result in results:
                found = result[name, layout, face]
                assert found.keys() == truth.keys()
                for key, values in truth.items():
                    wrong = [f for f, p in values.items() if not torch.equal(found[key][f], p)]
                    assert not wrong, (name, layout, face, key, wrong)
            moved = {f for f, p in truth["model"].items() if not torch.equal(p, start[f])}
            trained = {f for f, p in MODELS[name]().named_parameters() if p.requires_grad}
            assert moved == trained, (name, face)


def test_averages_and_the_files_of_hugging_face() -> None:
    """SWA and EMA of torch.optim.swa_utils; HuggingFaceStorageWriter and its reader."""
    check("plain")


def test_lora() -> None:
    pytest.importorskip("peft", reason="needs peft: launch/setup.sh launch,dev,hf,companions")
    pytest.importorskip("transformers", reason="needs transformers: launch/setup.sh launch,dev,hf")
    check("lora")


def test_float8() -> None:
    pytest.importorskip("torchao", reason="needs torchao: launch/setup.sh launch,dev,companions")
    check("float8", "float8_gather")


def test_tensors_that_keep_their_numbers_elsewhere_are_refused() -> None:
    """torchao's: quantised ones everywhere, those around a whole one by ZeroOptimizer. Frozen, they
    may lie beside what is trained.
    """
    pytest.importorskip("torchao", reason="needs torchao: launch/setup.sh launch,dev,companions")
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    optimizer_class, arguments = FACES["AdafacLO"]
    model = plain()
    quantize_(model, int8_weight_only_quantized_training())
    kept = r"'0.weight' is a Int8QuantizedTrainingLinearWeight, which keeps torch.float32 numbers"
    with pytest.raises(ValueError, match=kept):
        optimizer_class(model.named_parameters(), **arguments)
    for wrapped, said in ((model, kept), (float8_gather(), "numbers lie in another tensor")):
        with pytest.raises(ValueError, match=said):
            pylo_dist.ZeroOptimizer(wrapped, optimizer_class, process_group=False, **arguments)
    frozen = plain()
    quantize_(frozen, Int8WeightOnlyConfig())
    before = {fqn: p.detach().clone() for fqn, p in frozen.named_parameters()}
    optimizer = optimizer_class(frozen.named_parameters(), **arguments)
    loss_of(frozen, 0, 0).backward()
    optimizer.step()
    assert torch.equal(frozen[0].weight.dequantize(), before["0.weight"].dequantize())  # type: ignore[index, union-attr, operator]
    assert not torch.equal(frozen[0].bias, before["0.bias"])  # type: ignore[index, union-attr, arg-type]

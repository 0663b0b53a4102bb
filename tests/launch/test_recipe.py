"""Recipes in files: what they say, that flags win, that mistakes are named; and two settings of
PyLO's published script.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from data import Tokens
from learner import Learner
from loop import train
from options import WrongInput, parse
from place import Place

RECIPES = sorted((Path(__file__).resolve().parents[2] / "launch" / "recipes").glob("*.yaml"))


def test_every_recipe_is_a_command() -> None:
    assert {path.stem for path in RECIPES} == {
        "quickstart",
        "gpt2-124m",
        "gpt2-355m-pylo",
        "gpt2-355m-pylo-adamw",
    }
    for path in RECIPES:
        whole = yaml.safe_load(path.read_text())
        options = parse(["--recipe", str(path)])
        for key, value in whole["flags"].items():
            found = getattr(options, key)
            assert found == (type(found)(value) if found is not None else None), (path, key)
        assert whole["cost"] == "not yet run" or "measured" in whole["cost"]
        assert options.plan(8).accumulation >= 1


def test_the_published_recipe() -> None:
    path = next(path for path in RECIPES if path.stem == "gpt2-355m-pylo")
    velo, adamw = (
        parse(["--recipe", str(name)]) for name in (path, path.with_stem("gpt2-355m-pylo-adamw"))
    )
    assert (
        velo.optimizer,
        velo.qkv,
        velo.base_lr(),
        velo.steps,
        velo.max_grad_norm,
        velo.clip,
    ) == (
        *("velo", "split", 1.0, 19073),
        *(1.0, "per_tensor"),
    )
    # 10 billion tokens
    assert velo.steps * velo.plan(8).global_batch * velo.sequence_length() == 9_999_745_024
    assert velo.learned_arguments()["num_steps"] == 19073
    assert velo.learned_arguments()["clip"] == "per_tensor"
    assert (adamw.lr_at(381), adamw.lr_at(19073)) == (1e-3, pytest.approx(1e-4))
    for name in (
        "preset",
        "qkv",
        "steps",
        "batch_size",
        "block_size",
        "dtype",
        "order",
        "eval_every",
        "eval_batches",
        "seed",
    ):
        assert getattr(velo, name) == getattr(adamw, name), name
    mulo = parse(
        [
            "--recipe",
            str(path),
            "--optimizer",
            "mulo",
            "--mup-base-width",
            "1",
            "--mup-base-heads",
            "1",
        ]
    )
    assert mulo.learned_arguments()["clip"] == "per_tensor"
    assert mulo.config().width_mult == 1024


def test_flags_win(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "about: x\ncost: y\nflags:\n  preset: nano\n  steps: 7\n  lr: 1e-2\n  compile: true\n  "
        "data: some/folder\n"
    )
    found = parse(["--recipe", str(recipe)])
    assert (found.preset, found.steps, found.lr, found.compile, found.data) == (
        "nano",
        7,
        0.01,
        True,
        Path("some/folder"),
    )
    for words in (
        ["--recipe", str(recipe), "--steps", "9", "--no-compile"],
        ["--steps=9", "--no-compile", f"--recipe={recipe}"],
    ):
        found = parse(words)
        assert (found.preset, found.steps, found.compile) == ("nano", 9, False)
    # not 8, 90 and 1000.0
    recipe.write_text("about: x\ncost: y\nflags:\n  warmup: 010\n  out: 1:30\n  data: 1e3\n")
    found = parse(["--recipe", str(recipe)])
    assert (found.warmup, found.out, found.data) == (10, Path("1:30"), Path("1e3"))


def test_none_takes_back_what_a_recipe_says() -> None:
    quickstart, large = (
        ["--recipe", str(next(path for path in RECIPES if path.stem == name))]
        for name in ("quickstart", "gpt2-124m")
    )
    with pytest.raises(WrongInput, match="take a recipe's back: --weights none"):
        parse([*quickstart, "--optimizer", "adamw"])
    found = parse([*quickstart, "--optimizer", "adamw", "--weights", "none"])
    assert (found.optimizer, found.weights) == ("adamw", None)
    found = parse(
        [*large, "--save-every", "0", "--keep=none", "--max-grad-norm", "none", "--data", "none"]
    )
    assert (found.keep, found.max_grad_norm, found.data, found.clip_norm()) == (
        None,
        None,
        None,
        None,
    )
    with pytest.raises(WrongInput, match="--max-grad-norm: invalid float value: 'non'"):
        parse(["--max-grad-norm", "non"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("about: x\ncost: y\nflags: {stepz: 3}", "unknown key 'stepz'; the nearest is 'steps'"),
        ("about: x\ncost: y\nflags: {recipe: a.yaml}", "unknown key 'recipe'"),
        ("about: x\ncosts: y\nflags: {}", "unknown key 'costs'; the nearest is 'cost'"),
        ("about: x\nflags: {}", "is without cost"),
        ("about: x\ncost: y\nflags: 3", "under flags a mapping was wanted"),
        ("about: x\ncost: y\nflags: {steps: ten}", "argument --steps: invalid int value: 'ten'"),
        ("about: x\ncost: y\nflags: {steps: [1]}", r"steps is \['1'\]; a number or a text"),
        ("about: x\ncost: y\nflags: {steps: null}", "steps is 'null'; .* Leave it out"),
        ("about: x\ncost: y\nflags: {compile: 1}", "compile is '1'; true or false"),
        ("[1, 2]", "a mapping with about, cost, flags"),
        ("a: [", "cannot be read"),
    ],
)
def test_mistakes_are_named(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(WrongInput, match=words) as caught:
        parse(["--recipe", str(path)])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_and_settings_that_do_not_go_together(tmp_path: Path) -> None:
    for words, said in (
        (["--recipe", str(tmp_path / "gone.yaml")], "gone.yaml cannot be read"),
        (["--clip", "per_tensor"], "with --max-grad-norm; pass that"),
        (
            ["--clip", "per_tensor", "--optimizer", "adamw", "--max-grad-norm", "1"],
            "--clip per_tensor is for learned optimizers",
        ),
        (
            ["--state-dtype", "bfloat16", "--optimizer", "adamw"],
            "--state-dtype bfloat16 is for learned optimizers and means nothing to adamw",
        ),
        (["--grad-scale", "0"], "--grad-scale is 0.0"),
        (
            ["--grad-scale", "2", "--deepspeed", "x.json"],
            "--grad-scale does not go with --deepspeed",
        ),
        (
            ["--clip", "per_tensor", "--max-grad-norm", "1", "--deepspeed", "x.json"],
            "--clip does not go with --deepspeed",
        ),
        (["--beside", "adamw", "--deepspeed", "x.json"], "--beside adamw does not go with --deep"),
    ):
        with pytest.raises(WrongInput, match=said):
            parse(words)


def test_the_dtype_of_state_reaches_the_optimizer() -> None:
    given = parse(["--weights", "demo", "--state-dtype", "bfloat16"]).learned_arguments()
    assert given["state_dtype"] == "bfloat16"
    assert "state_dtype" not in parse(["--weights", "demo"]).learned_arguments()


def test_the_scale_reaches_the_gradients_and_the_clipping(learned_weights: dict[str, Path]) -> None:
    """As in PyLO's published script: gradients of a scaled loss, which nobody unscales, clipped
    tensor by tensor.
    """
    words = [
        "--preset",
        "nano",
        "--block-size",
        "8",
        "--optimizer",
        "adafaclo",
        "--device",
        "cpu",
        "--steps",
        "1",
    ]
    words += ["--batch-size", "2", "--weights", str(learned_weights["adafaclo"])]
    tokens = Tokens.from_bytes("text", bytes(range(200)), block_size=8, vocab_size=256)

    def after(*extra: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The gradients that the optimizer saw in a step, and the parameters after it."""
        options, grads = parse([*words, *extra]), []
        place = Place.find(options)
        learner = Learner(options, place)

        def before_step(*_: object) -> None:
            grads.extend(p.grad.clone() for p in learner.model.parameters() if p.grad is not None)

        learner.optimizer.register_step_pre_hook(before_step)
        train(learner, (tokens, None), options, place, options.plan(1), None)
        return grads, [p.detach().clone() for p in learner.model.parameters()]

    plain, plain_params = after()
    scaled, scaled_params = after("--grad-scale", "1024")
    assert len(plain) == len(plain_params)
    # a power of two scales every product and sum of backward exactly
    assert all(torch.equal(1024 * a, b) for a, b in zip(plain, scaled, strict=True))
    # the epsilons know the scale
    assert not all(torch.equal(a, b) for a, b in zip(plain_params, scaled_params, strict=True))
    # Clipped tensor by tensor, gradients of any scale above the bound are the same but for
    # rounding; by their global norm they keep their sizes among each other, which is another step.
    bound = ["--max-grad-norm", "1e-4"]
    one, thousand = (
        after("--clip", "per_tensor", *bound, "--grad-scale", scale)[1] for scale in ("1", "1024")
    )
    globally = after(*bound)[1]
    assert all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(one, thousand, strict=True)
    )
    assert not all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(one, globally, strict=True)
    )


@pytest.mark.parametrize("flag", ["--warmup", "--max-grad-norm", "--recipe", "--mup-base-heads"])
def test_dashes_are_no_value(flag: str) -> None:
    with pytest.raises(WrongInput, match=f"{flag}=--: wanted a value after the equals sign"):
        parse([f"{flag}=--"])

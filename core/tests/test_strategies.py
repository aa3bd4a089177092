"""What a strategy imposes, and who is refused under it: by one rule in ``check``, ``trainer_kwargs`` and ``fit``."""

import eke
import pytest
import torch
from eke import Technique, strategies
from eke.spec import IMPOSITIONS
from eke.testing import TinyBlocks, fit
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

SHARDED = ("sharded optimizer", "sharded gradients", "sharded parameters")


def technique(*effects, **fields):
    record = Technique("one", "callback", effects=effects, **fields)
    return type("One", (eke.TechniqueCallback,), {"technique": record})()


def imposing(*words):
    """A strategy on one device that says it does this."""
    record = Technique("apart", "strategy", imposes=words)
    return type("Apart", (SingleDeviceStrategy,), {"technique": record})("cpu")


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (lambda: SingleDeviceStrategy("cpu"), ()),
        (DDPStrategy, ()),
        (FSDPStrategy, (*SHARDED, "gathered states", "awaited blocks")),
        (ModelParallelStrategy, SHARDED),
        (lambda: ModelParallelStrategy(save_distributed_checkpoint=False), (*SHARDED, "gathered states")),
    ],
)
def test_lightnings_own_strategies_are_known(strategy, words):
    assert strategies.imposed(strategy()) == words


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_takes_the_step_at_every_stage_and_shards_one_thing_more_with_each(stage):
    strategy = object.__new__(DeepSpeedStrategy)  # its constructor asks for the library
    strategy.config = {"zero_optimization": {"stage": stage}} if stage else None
    assert strategies.imposed(strategy) == (*SHARDED[:stage], "own optimizer")


def test_a_strategy_that_nobody_knows_may_do_anything():
    class Strange(Strategy):
        pass

    Strange.__abstractmethods__ = frozenset()
    assert strategies.imposed(object.__new__(Strange)) == tuple(IMPOSITIONS)


@pytest.mark.parametrize("word", IMPOSITIONS)
def test_who_touches_what_a_word_concerns_has_to_tolerate_it(word):
    for resource in IMPOSITIONS[word][1]:
        for verb in ("replaces", "changes", "reads"):
            effect = f"{verb} {resource}"
            (words,) = strategies.refusals([technique(effect)], imposing(word))
            assert words.startswith(
                f"'one' {effect}, and 'apart' imposes {word!r}: {IMPOSITIONS[word][0]}. It does not"
            )
            assert strategies.refusals([technique(effect, tolerates=(word,))], imposing(word)) == []
    others = tuple(other for other in IMPOSITIONS if other != word)
    assert strategies.refusals([technique(effect, tolerates=others)], imposing(word)) != []


def test_who_touches_nothing_that_a_word_concerns_need_not_speak_of_it():
    assert strategies.refusals([technique("changes batch content", "replaces loss")], imposing(*IMPOSITIONS)) == []


def test_a_technique_says_why_it_cannot_and_what_to_do():
    one = technique("changes weights", "changes optimizer state", intolerance="It grows. Use strategy='ddp'.")
    (words,) = strategies.refusals([one], imposing("sharded parameters"))
    assert words == (
        "'one' changes weights and changes optimizer state, and 'apart' imposes 'sharded parameters': each process "
        "holds a part of each parameter. It grows. Use strategy='ddp'."
    )


class Staged(eke.TechniqueStrategy, SingleDeviceStrategy):
    technique = Technique("staged", "strategy", imposes=lambda stage=3: SHARDED[:stage])

    def __init__(self, name: str = "", stage: int = 3) -> None:
        self.stage = stage
        super().__init__("cpu")


class Picky(eke.TechniqueCallback):
    technique = Technique(
        "picky",
        "callback",
        effects=("reads gradients",),
        tolerates=lambda method="whole": ("sharded gradients",) if method == "parts" else (),
    )

    def __init__(self, method: str = "whole") -> None:
        self.method = method


def test_what_is_imposed_and_tolerated_follows_the_arguments():
    assert [len(strategies.imposed(Staged(stage=stage))) for stage in (0, 1, 2, 3)] == [0, 1, 2, 3]
    assert len(strategies.refusals([Picky()], Staged(stage=2))) == 1
    assert strategies.refusals([Picky("parts")], Staged(stage=2)) == []
    assert strategies.refusals([Picky()], Staged(stage=1)) == []


def test_an_argument_that_is_not_kept_has_its_default():
    assert strategies.arguments_of(Staged(stage=1)) == {"name": "", "stage": 1}


def test_a_function_that_says_a_word_of_its_own_is_refused():
    record = Technique("x", "strategy", imposes=lambda: ("sharded hopes",))
    with pytest.raises(ValueError, match="imposed or tolerated is 'sharded hopes'. Use one of: sharded optimizer, "):
        record.imposed({})


def test_fit_refuses_before_the_first_step_in_the_same_words_and_validate_does_not():
    model = TinyBlocks()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(strategies.StrategyError) as caught:
        fit(model, Picky(), Staged())
    assert str(caught.value) == strategies.refusals([Picky()], Staged())[0]
    assert isinstance(caught.value, (eke.ConflictError, MisconfigurationException))
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
    fit(TinyBlocks(), Picky("parts"), Staged())


WHAT_GOES = [
    ({"stacking": {"stages": [0.3]}, "zero": {"stage": 3}}, "'stacking' changes optimizer state, and 'zero' imposes"),
    ({"stacking": {}, "zero": {"stage": 1}}, "'sharded optimizer'"),
    ({"adam8bit": {}, "zero": {"stage": 3}}, "'gathered states'.*ZeRO.checkpoint='sharded'"),
    ({"adam8bit": {}, "zero": {"stage": 2, "checkpoint": "sharded"}}, ""),
    ({"adam8bit": {"backend": "torch"}, "zero": {"checkpoint": "sharded"}}, "backend='auto' or 'torchao'"),
    ({"adam8bit": {}, "zero": {"stage": 1}}, ""),
    ({"adam8bit": {}, "zero": {"stage": 2, "engine": "deepspeed"}}, "'own optimizer'"),
    ({"mae": {}, "zero": {"stage": 3}}, "'mae' changes module tree.*Its decoder"),
    ({"mae": {}, "zero": {"stage": 1}}, ""),
    ({"peft": {"method": "adalora"}, "zero": {"stage": 2}}, "AdaLoRA looks at whole gradients"),
    ({"peft": {"method": "adalora"}, "zero": {"stage": 1}}, ""),
    ({"peft": {}, "report": {}, "layer_drop": {}, "infobatch": {}, "fp8": {}, "zero": {"stage": 3}}, ""),
]


@pytest.mark.parametrize(("recipe", "words"), WHAT_GOES, ids=[str(recipe) for recipe, _ in WHAT_GOES])
def test_check_and_trainer_kwargs_refuse_what_fit_refuses_and_nothing_else(
    recipe, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.delenv("COLUMNS", raising=False)  # a line stays a line
    import re

    import yaml
    from eke.__main__ import main

    if missing := [name for name in recipe if name not in eke.available()]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if recipe["zero"].get("engine") == "deepspeed":
        pytest.importorskip("deepspeed")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    code = main(["check", str(file)])
    refused = [line for line in capsys.readouterr().out.splitlines() if line.startswith("REFUSED: ")]
    assert code == len(refused) == bool(words), refused
    if not words:
        eke.trainer_kwargs(**recipe)
        return
    with pytest.raises(strategies.StrategyError, match=words) as caught:
        eke.trainer_kwargs(**recipe)
    assert refused == [f"REFUSED: {caught.value}"]
    assert re.search(words, refused[0])


@pytest.mark.parametrize(("strategy", "refused"), [("fsdp", 1), ("ddp", 0), ("no_such_strategy", 0)])
def test_check_knows_the_strategies_that_a_lightning_cli_file_names(strategy, refused, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # a line stays a line
    pytest.importorskip("eke_layer_drop")
    pytest.importorskip("jsonargparse")
    from eke.__main__ import main

    file = tmp_path / "cli.yaml"
    file.write_text(f"trainer: {{strategy: {strategy}, callbacks: [{{class_path: eke_layer_drop.LayerDrop}}]}}\n")
    assert main(["check", str(file)]) == refused
    out = capsys.readouterr().out
    assert out.count("'layer_drop' changes hidden states, and FSDPStrategy imposes 'awaited blocks'") == refused
    file.write_text(
        "trainer:\n  callbacks: [{class_path: eke_layer_drop.LayerDrop}]\n"
        "  strategy: {class_path: lightning.pytorch.strategies.FSDPStrategy}\n"
    )
    assert main(["check", str(file)]) == 1

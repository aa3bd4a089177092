import dataclasses
import subprocess
import sys

import pytest
from eke import Technique
from eke.spec import EXACTNESS, IMPOSITIONS, KINDS, NEEDS, RESOURCES, SEAMS, VERBS


@pytest.mark.parametrize("name", ["remat", "token_drop", "adam8bit", "x"])
def test_lower_case_words_joined_by_underscores_make_a_name(name):
    assert Technique(name, "callback").name == name


@pytest.mark.parametrize("name", ["", "TokenDrop", "token-drop", "_drop", "drop_", "token__drop", "token drop"])
def test_another_name_is_refused_with_an_example(name):
    with pytest.raises(ValueError, match=f"technique name '{name}': use lower-case words .* as token_drop"):
        Technique(name, "callback")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "hook"}, "kind is 'hook'. Use one of: callback, plugin, strategy."),
        ({"exactness": "close"}, f"exactness is 'close'. Use one of: {', '.join(EXACTNESS)}."),
        ({"needs": ("luck",)}, f"need is 'luck'. Use one of: {', '.join(NEEDS)}."),
        ({"effects": ("burns weights",)}, "verb of effect 'burns weights' is 'burns'. Use one of: replaces, changes"),
        (
            {"effects": ("reads minds",)},
            f"resource of effect 'reads minds' is 'minds'. Use one of: {next(iter(RESOURCES))}, ",
        ),
        ({"topics": ("cooking",)}, "topic is 'cooking'. Use one of: optimizer, initialization, "),
        ({"tolerates": ("noise",)}, "what is imposed or tolerated is 'noise'. Use one of: sharded optimizer, "),
        ({"imposes": ("noise",)}, "what is imposed or tolerated is 'noise'. Use one of: sharded optimizer, "),
        ({"effects": ("weights",)}, "verb of effect 'weights' is 'weights'. Use one of: "),
    ],
)
def test_a_word_outside_the_vocabulary_is_refused_with_the_vocabulary(fields, message):
    with pytest.raises(ValueError, match="Use one of") as caught:
        Technique(**{"name": "x", "kind": "callback", **fields})
    assert str(caught.value).startswith(message)


def test_exactness_may_go_by_the_arguments_that_matter():
    record = Technique("x", "callback", exactness=lambda keep=0.5: "exact" if keep == 1 else "approximate")
    assert record.exactness_of({}) == "approximate"
    assert record.exactness_of({"keep": 1, "other": 3}) == "exact"
    assert Technique("y", "callback", exactness="unbiased").exactness_of({"keep": 1}) == "unbiased"
    with pytest.raises(ValueError, match="exactness is 'close'. Use one of: exact, reordered sums"):
        Technique("z", "callback", exactness=lambda: "close").exactness_of({})


@pytest.mark.parametrize("field", ["topics", "survey", "effects", "needs", "after", "imposes", "tolerates"])
def test_a_string_where_a_tuple_is_needed_is_refused(field):
    with pytest.raises(
        ValueError, match=f"{field}='reads weights' is one string: it needs a tuple, .*'reads weights',"
    ):
        Technique("x", "callback", **{field: "reads weights"})


def test_what_the_survey_does_not_name_is_refused():
    with pytest.raises(ValueError, match=r"survey names 'qlora', which is no key of eke.survey. `eke list --survey`"):
        Technique("x", "callback", survey=("lora", "qlora"))


def test_every_word_has_a_definition_and_every_resource_a_seam():
    for words in (VERBS, RESOURCES, EXACTNESS):
        assert all(len(definition.split()) > 2 for definition in words.values())
    assert {resource for settled in SEAMS.values() for resource in settled} == set(RESOURCES)
    assert {resource for _, concerned in IMPOSITIONS.values() for resource in concerned} <= set(RESOURCES)


def test_every_verb_goes_with_every_resource():
    effects = tuple(f"{verb} {resource}" for verb in VERBS for resource in RESOURCES)
    record = Technique("x", "callback", effects=effects)
    assert all(record.touches(verb) == set(RESOURCES) for verb in VERBS)
    assert record.touched() == set(RESOURCES)


def test_a_resource_counts_only_under_its_own_verb():
    record = Technique("x", "callback", effects=("changes optimizer state", "reads optimizer"))
    assert record.touches("changes") == {"optimizer state"}
    assert record.touches("reads") == {"optimizer"}
    assert record.touches("replaces") == set()


def test_the_factory_is_imported_only_when_it_is_asked_for():
    record = Technique("x", "callback", factory="a_module_that_is_not_there:Thing")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        record.resolve()


@pytest.mark.parametrize("factory", [dict, "builtins:dict"])
def test_a_factory_may_be_given_or_named(factory):
    assert Technique("x", "callback", factory=factory).build(a=1) == {"a": 1}


def test_a_record_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Technique("x", "callback").name = "y"


def test_the_folders_are_the_kinds():
    assert KINDS == ("callback", "plugin", "strategy")


def test_the_record_imports_neither_torch_nor_lightning():
    code = "import sys, eke.spec, eke.compose; sys.exit(bool({'torch', 'lightning'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)

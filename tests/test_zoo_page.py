"""docs/zoo.md says what the packages hold, and all of them have met the zoo."""

import importlib.util
from pathlib import Path

import eke
from eke.testing.zoo import ZOO

REPO = Path(__file__).parents[1]


def tool():
    spec = importlib.util.spec_from_file_location("zoo_page", REPO / "tools" / "zoo_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_fresh():
    assert tool().main(["--check"]) == 0, "docs/zoo.md is stale: run make zoo"


def test_every_technique_of_the_checkout_has_met_every_animal_that_can_be_built_here():
    found = tool().stored(REPO)
    assert set(eke.available()) <= set(found)
    here = {name for name, animal in ZOO.items() if not animal.missing}
    for technique, one in found.items():
        assert here <= set(one["animals"]), technique
        assert {cell["outcome"] for cell in one["animals"].values()} <= {"trains", "refuses", "nothing to do"}


def test_a_refusal_is_shown_once_with_all_models_that_it_is_for():
    cells = {
        "bert": {"outcome": "trains", "words": "3 of 6 rows"},
        "vit": {"outcome": "refuses", "words": "It needs *texts*."},
        "cnn": {"outcome": "refuses", "words": "It needs *texts*."},
    }
    assert tool().details(cells) == ["Trains bert: 3 of 6 rows.", r"- vit, cnn: It needs \*texts\*."]

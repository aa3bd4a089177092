"""The page for authors says what the code does."""

import re
from pathlib import Path

import pytest
from eke.spec import SEAMS
from eke.technique import TechniqueCallback

REPO = Path(__file__).parents[2]
PAGE = REPO / "docs" / "authoring.md"
SKETCHES = Path(__file__).parent / "sketches"

if not PAGE.exists():
    pytest.skip("the page lies in the checkout", allow_module_level=True)


@pytest.mark.parametrize("name", ["optimizer", "averages"])
def test_the_examples_are_sketches_that_pass_the_contract(name):
    text = (SKETCHES / f"sketch_{name}.py").read_text()
    assert text[text.index('"""', 3) + 3 :].strip() in PAGE.read_text()


def test_every_method_of_a_technique_is_on_the_page_and_none_that_is_not_there():
    own = {name for name in vars(TechniqueCallback) if not name.startswith("_")}
    own -= {"technique", "counts", "passes", "version", "run", "progress", "generator", "setup"}
    own -= {"step_kind", "on_this_machine"}  # for benchmarks and for eke check
    page = PAGE.read_text()
    assert {name for name in own if name not in page} == set()
    named = set(re.findall(r"─ (\w+)\(run", page))
    assert named <= own
    assert set(SEAMS) <= own


def test_every_sketch_is_on_the_page_and_every_link_leads_somewhere():
    page = PAGE.read_text()
    assert {file.name for file in SKETCHES.glob("sketch_*.py")} == set(re.findall(r"sketches/(sketch_\w+\.py)", page))
    for link in re.findall(r"\]\((\.\.[^)#]+)\)", page):
        assert (PAGE.parent / link).exists(), link

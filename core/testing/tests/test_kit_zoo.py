"""What the kit makes of techniques in the zoo: each faulty one is caught, by words that say at what."""

import json
import warnings

import pytest
from eke import EkeError, NoEffectWarning, Run, Technique, TechniqueCallback
from eke.testing import certify, checks
from eke.testing.certify import Outcomes, Row
from eke.testing.contract import TechniqueContract
from eke.testing.zoo import ZOO

FLAT = ZOO["flat"]


class Faulty(TechniqueCallback):
    technique = Technique(name="faulty", kind="callback", effects=("changes loss",), exactness="model-changing")


class Silent(Faulty):
    """Does nothing."""


class Doubles(Faulty):
    def __init__(self, factor: float = 2.0, level: int = 1):
        self.factor, self.level = factor, level

    def around_step(self, run: Run, call_next, batch, *args):
        return call_next(batch, *args) * self.factor


class Refuses(Doubles):
    words = "Refuses finds nothing here. Leave it out of this run."

    def check(self, run: Run):
        if self.level < 2:
            raise EkeError(self.words)


class Advises(Refuses):
    words = "Advises needs another level. Give Advises(level=2)."


class AdvisesInVain(Refuses):
    words = "AdvisesInVain needs another level. Give AdvisesInVain(factor=3.0)."


class AdvisesWhatFails(Refuses):
    words = "AdvisesWhatFails needs another level. Give AdvisesWhatFails(level=3)."

    def around_step(self, run, call_next, batch, *args):
        return call_next(batch[: self.level - 2], *args)


class SaysPython(Refuses):
    words = "It failed: 'NoneType' object has no attribute 'shape'."


class SaysTooMuch(Refuses):
    words = "word " * 200


class Late(Faulty):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            raise EkeError("Late found out at the end of the second batch that it cannot work here.")


class Breaks(Faulty):
    def around_step(self, run, call_next, batch, *args):
        raise KeyError("exp_avg")


class Explodes(Doubles):
    def around_step(self, run, call_next, batch, *args):
        return call_next(batch, *args) * float("nan")


class Warns(Faulty):
    def alter_model(self, run):

        warnings.warn(
            "Warns finds no layer of its kind, and the model has 3 of another.", NoEffectWarning, stacklevel=2
        )


def meets(build, animal=FLAT, shows=checks.differs, **options):
    return checks.meets(animal, lambda animal: build(), shows, **options)


def test_one_that_acts_trains_and_its_check_is_given_both_runs():
    def shows(plain, seen):
        assert plain.technique is None
        assert isinstance(seen.technique, Doubles)
        assert seen.losses[0] == 2 * plain.losses[0]
        assert plain.in_blocks() == seen.in_blocks() > 0
        return "twice"

    assert meets(Doubles, shows=shows) == {
        "technique": "faulty",
        "animal": "flat",
        "outcome": "trains",
        "words": "twice",
    }


def test_rows_are_the_tokens_that_went_through_each_layer_once_a_call():
    def shows(plain, seen):
        length, batch = 11, 4
        linear = {path: rows for path, rows in plain.rows[0].items() if path.startswith("model.blocks.0.w")}
        assert linear == dict.fromkeys(linear, batch * length)
        assert len(linear) == 4
        assert plain.calls[0]["model.blocks.0.wq"] == 1
        assert plain.in_blocks() + plain.in_blocks(blocks=False) == sum(sum(one.values()) for one in plain.rows)
        return ""

    meets(Doubles, shows=shows)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (Silent, "the same as without it"),
        (Late, "refused only after the first step"),
        (AdvisesInVain, "factor=3.0 is advised and does not help"),
        (AdvisesWhatFails, "level=3 is advised and ends in ValueError"),
        (SaysPython, "in words and not in Python's"),
        (SaysTooMuch, "shortly"),
        (Explodes, "not finite"),
    ],
)
def test_a_fault_is_named(build, said):
    with pytest.raises(AssertionError, match=said):
        meets(build)


def test_an_error_of_pythons_comes_through():
    with pytest.raises(KeyError, match="exp_avg"):
        meets(Breaks)


@pytest.mark.parametrize("build", [Refuses, Advises])
def test_a_refusal_in_words_is_an_answer(build):
    found = meets(build)
    assert (found["outcome"], found["words"]) == ("refuses", build.words)


def test_a_warning_that_there_is_nothing_to_do_is_an_answer():
    assert meets(Warns)["outcome"] == "nothing to do"


def test_a_setting_of_the_model_that_is_advised_and_is_so_already_is_named():
    class Cache(Refuses):
        words = "Cache cannot work with a cache of keys. Build the model with use_cache=False."

    with pytest.raises(AssertionError, match="for a model that has none"):
        meets(Cache)


def test_the_zoo_belongs_to_the_three_lines_of_a_contract():
    assert "test_in_the_zoo_it_trains_or_says_why_not" in TechniqueContract.items()


def rows(outcome="passed"):
    came = {"technique": "layer_drop", "animal": "flat", "outcome": "trains", "words": "3 of 6 rows"}
    one = Row("test[flat]", "test", ".", zoo="file::First", came=came, outcome="passed")
    other = Row("test[bert]", "test", ".", zoo="file::First", came={**came, "animal": "bert"}, outcome=outcome)
    second = Row("test[flat]", "test", ".", zoo="file::Second", came={**came, "words": "another"}, outcome="passed")
    return Outcomes({str(number): row for number, row in enumerate((one, other, second))})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(certify, "_package_folder", lambda name: tmp_path)
    return tmp_path


def test_what_became_of_a_technique_is_written_beside_its_certificate_by_the_first_class_that_tried_it(folder):
    (line,) = certify.met(rows())
    assert "layer_drop" in line
    stored = json.loads((folder / "zoo.json").read_text())
    assert stored["technique"] == "layer_drop"
    assert stored["animals"]["flat"] == {"outcome": "trains", "words": "3 of 6 rows"}
    assert set(stored["animals"]) == {"flat", "bert"}
    assert {"eke", "torch", "lightning", "eke-layer-drop"} <= set(stored["versions"])


def test_where_one_of_its_tests_failed_nothing_is_written(folder):
    assert certify.met(rows("failed")) == ["First: nothing written of the zoo: test[bert]"]
    assert not (folder / "zoo.json").exists()


def test_what_another_machine_found_stays(folder):
    certify.met(rows())
    file = folder / "zoo.json"
    stored = json.loads(file.read_text())
    elsewhere = {"outcome": "refuses", "words": "It needs a GPU."}
    file.write_text(json.dumps({**stored, "animals": {"timm_vit": elsewhere, "gone": elsewhere}}))
    certify.met(rows())
    animals = json.loads(file.read_text())["animals"]
    assert animals["timm_vit"] == elsewhere
    assert list(animals) == ["bert", "timm_vit", "flat"]  # in the order of the zoo, and only what it has

"""A stranger's technique of each kind, in at most forty lines, by public names alone, through the whole contract."""

import ast
from pathlib import Path

import pytest
from eke.testing import TechniqueContract

SKETCHES = sorted(Path(__file__).parent.glob("sketch_*.py"))
STRANGER = {"test_it_has_a_record": "A sketch is not installed, so no registry holds its record."}


@pytest.mark.parametrize("file", SKETCHES, ids=lambda file: file.stem)
def test_a_sketch_has_forty_lines_at_most_and_no_private_names(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 40
    names = [node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
    names += [
        alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    names = [name for name in names if name != "_replace"]  # of a named tuple, whose public names begin so
    assert not [name for name in names if name.startswith("_") and not name.startswith("__") and name != "_"]


ALWAYS = {"test_it_costs_nothing_when_it_has_nothing_to_do": "There is no step in which it has nothing to do."}


class Sketch(TechniqueContract):
    exceptions = {**STRANGER, **ALWAYS}
    zoo = ("gpt2", "t5", "vit", "encoder")  # some: what is tried here is the core


class TestSchedule(Sketch):
    arguments = {"warm": 0.2}

    def build(self):
        from sketch_schedule import WarmStableDecay

        return WarmStableDecay()


class TestTwoPasses(Sketch):
    exceptions = {
        **Sketch.exceptions,
        "test_beside_a_second_pass_it_sees_one_step": "It has a second pass itself, and both replace the gradients.",
    }

    def build(self):
        from sketch_two_passes import SAM

        return SAM()


class TestLossTerm(Sketch):
    def build(self):
        from sketch_loss_term import SmallActivations

        return SmallActivations()


class TestInitialization(Sketch):
    def build(self):
        from sketch_initialization import Orthogonal

        return Orthogonal()


class TestOptimizerByRoles(Sketch):
    exceptions = {
        **Sketch.exceptions,
        "test_its_checkpoint_loads_without_it_or_says_why_not": "The state is Lion's, with groups of its own.",
    }

    def build(self):
        from sketch_optimizer import UseLion

        return UseLion()


class TestLayerSwap(Sketch):
    def build(self):
        from sketch_layer_swap import RoundWeights

        return RoundWeights()


class TestSavedTensors(Sketch):
    tolerance = 2e-3  # it rounds to bfloat16, and sums in another order round otherwise

    def build(self):
        from sketch_saved_tensors import HalfActivations

        return HalfActivations()


class TestRecompute(Sketch):
    def build(self):
        from sketch_recompute import RecomputePairs

        return RecomputePairs()


class TestAttention(Sketch):
    def build(self):
        from sketch_attention import Window

        return Window()

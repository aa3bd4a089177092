import pytest
from eke.testing import TechniqueContract, TinyBlocks, TinyGPT2, TinyTransformer
from eke_attention import Attention, Documents, Sanger, SlidingWindow

ALWAYS = {
    "test_it_costs_nothing_when_it_has_nothing_to_do": "There is no step in which it has nothing to do.",
    "test_it_pickles_and_deep_copies": "A copy of a model in training is a plain one, and lets all pairs meet.",
}
RANGES = "The range of its few bits follows the batch, and a part of one has another."


class TestContract(TechniqueContract):
    zoo = ("gpt2",)
    arguments = {"kernel": "sdpa"}
    extra_calls = 300  # attention is caught where it is called
    unseen = {"changes attention": "On a CPU the kernel that it takes by itself is the one that was there."}

    def build(self):
        return Attention()

    def shows(self, plain, seen):
        assert seen.losses == pytest.approx(plain.losses)
        return ""


class TestContractOfBlocks(TechniqueContract):
    exceptions = ALWAYS

    def build(self):
        return Attention(SlidingWindow(3, block=4))

    def build_in_zoo(self, animal):
        return Attention(SlidingWindow(1, block=1))

    def shows(self, plain, seen):
        assert seen.losses != plain.losses
        return ""


class TestContractOfDocuments(TechniqueContract):
    zoo = ("gpt2",)
    shapes = (TinyBlocks, TinyTransformer, TinyGPT2)  # images have no separators
    exceptions = ALWAYS

    def build(self):
        return Attention(Documents(separator=3, block=4))


class TestContractOfPredictedPairs(TechniqueContract):
    zoo = ("gpt2",)
    exceptions = {
        **ALWAYS,
        "test_accumulated_gradients_equal_the_big_batch": RANGES,
        "test_two_processes_equal_one": RANGES,
    }

    def build(self):
        return Attention(Sanger(0.05))

    def build_in_zoo(self, animal):
        return Attention(Sanger(0.3))

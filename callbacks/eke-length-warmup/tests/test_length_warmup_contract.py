from eke.testing import TechniqueContract, TinyBlocks, TinyGPT2, TinyTransformer
from eke_length_warmup import LengthWarmup


class TestContract(TechniqueContract):
    arguments = {"start": 4, "duration": 8, "multiple": 2}
    shapes = (TinyBlocks, TinyTransformer, TinyGPT2)
    extra_calls = 30  # the seam that hands it each batch, and the one around each step

    def build(self):
        return LengthWarmup(4, duration=8, multiple=2)

    def idle(self):
        return LengthWarmup(4096, duration=2)  # from the third step on there is nothing to do

    def build_in_zoo(self, animal):
        return LengthWarmup(4, duration=1.0, multiple=1)

    def shows(self, plain, seen):
        assert 0 < seen.in_blocks() < plain.in_blocks()
        return seen.share_of(plain)


class TestContractOfReshape(TestContract):
    zoo = ("llama", "t5")
    arguments = {"start": 4, "duration": 8, "multiple": 2, "mode": "reshape"}

    def build(self):
        return LengthWarmup(4, duration=8, multiple=2, mode="reshape")

    def build_in_zoo(self, animal):
        return LengthWarmup(4, duration=1.0, multiple=1, mode="reshape")

    def shows(self, plain, seen):
        assert 0 < seen.in_blocks() <= plain.in_blocks()  # as many tokens but those of a remainder
        assert seen.losses != plain.losses
        return seen.share_of(plain)

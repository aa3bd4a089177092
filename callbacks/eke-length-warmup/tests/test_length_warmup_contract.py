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


class TestContractOfReshape(TestContract):
    arguments = {"start": 4, "duration": 8, "multiple": 2, "mode": "reshape"}

    def build(self):
        return LengthWarmup(4, duration=8, multiple=2, mode="reshape")

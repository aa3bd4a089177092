import pytest
from eke.testing import TechniqueContract
from eke_remat import Remat


class TestContract(TechniqueContract):
    def build(self):
        return Remat()

    def shows(self, plain, seen):
        assert seen.in_blocks(seen.again) > plain.in_blocks(plain.again)
        assert seen.losses == pytest.approx(plain.losses, rel=1e-6)
        return f"{seen.in_blocks(seen.again)} of {seen.in_blocks()} rows computed again"


class TestContractOfSpans(TechniqueContract):
    zoo = ("gpt2",)
    arguments = {"span": 2, "every": 1}

    def build(self):
        return Remat(span=2)


class TestContractOfPolicies(TechniqueContract):
    zoo = ("gpt2",)
    arguments = {"policy": "every second"}

    def build(self):
        return Remat("every second")

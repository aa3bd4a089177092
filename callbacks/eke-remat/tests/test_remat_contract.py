from eke.testing import TechniqueContract
from eke_remat import Remat


class TestContract(TechniqueContract):
    def build(self):
        return Remat()


class TestContractOfSpans(TechniqueContract):
    arguments = {"span": 2, "every": 1}

    def build(self):
        return Remat(span=2)


class TestContractOfPolicies(TechniqueContract):
    arguments = {"policy": "every second"}

    def build(self):
        return Remat("every second")

from eke.testing import TechniqueContract
from eke_random_ltd import RandomLTD


class TestContract(TechniqueContract):
    arguments = {"start": 0.25, "duration": 8, "multiple": 2}

    def build(self):
        return RandomLTD(0.25, duration=8, multiple=2)

    def idle(self):
        return RandomLTD(1.0)

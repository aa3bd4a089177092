from eke.testing import TechniqueContract
from eke_random_ltd import RandomLTD


class TestContract(TechniqueContract):
    arguments = {"start": 0.25, "duration": 8, "multiple": 2}

    def build(self):
        return RandomLTD(0.25, duration=8, multiple=2)

    def idle(self):
        return RandomLTD(1.0)

    def build_in_zoo(self, animal):
        return RandomLTD(0.5, duration=1.0, multiple=1)

    def shows(self, plain, seen):
        assert 0 < seen.in_blocks() < plain.in_blocks()
        return seen.share_of(plain)

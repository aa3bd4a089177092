from eke.testing import TechniqueContract
from eke_importance_sampling import ImportanceSampling


class TestContract(TechniqueContract):
    arguments = {"keep": 0.5, "threshold": 0.0}
    extra_calls = 400  # a look at every batch is a pass of its own

    def build(self):
        return ImportanceSampling(0.5, threshold=0.0)

    def idle(self):
        return ImportanceSampling(1.0)

    def shows(self, plain, seen):
        assert seen.shares(plain) in ({0.5}, {0.5, 1.0})  # samples of which a gradient is taken
        return seen.share_of(plain)

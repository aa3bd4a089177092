from eke.testing import TechniqueContract
from eke_rho_loss import RhoLoss


class TestContract(TechniqueContract):
    arguments = {"file": "zero", "keep": 0.5}
    extra_calls = 400  # a look at every batch is a pass of its own

    def build(self):
        return RhoLoss("zero", 0.5)

    def idle(self):
        return RhoLoss("zero", 1.0)

    def shows(self, plain, seen):
        assert seen.shares(plain) in ({0.5}, {0.5, 1.0})  # samples of which a gradient is taken
        return seen.share_of(plain)

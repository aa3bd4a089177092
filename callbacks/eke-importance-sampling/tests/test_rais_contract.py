from eke.testing import TechniqueContract
from eke_importance_sampling import RAIS


class TestContract(TechniqueContract):
    arguments = {"floor": 0.3}
    extra_calls = 80  # the seam around each step, and the norms

    def build(self):
        return RAIS(0.3)

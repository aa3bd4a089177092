import pytest
from eke.testing import TechniqueContract
from eke_importance_sampling import RAIS


class TestContract(TechniqueContract):
    arguments = {"floor": 0.3}
    extra_calls = 80  # the seam around each step, and the norms

    def build(self):
        return RAIS(0.3)

    zoo_run = {"epochs": 2}

    def shows(self, plain, seen):
        first, second = seen.losses[:2], seen.losses[2:]
        assert first == pytest.approx(plain.losses[:2])  # the first epoch has no norms yet
        assert second != pytest.approx(plain.losses[2:])
        return ""

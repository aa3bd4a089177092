from eke.testing import TechniqueContract
from eke_stacking import Stacking


class TestContract(TechniqueContract):
    arguments = {"stages": [4]}

    def build(self):
        return Stacking([4])

from eke.testing import TechniqueContract
from eke_stacking import Stacking


class TestContract(TechniqueContract):
    arguments = {"stages": [4]}

    def build(self):
        return Stacking([4])


class TestContractOfTrueGrowth(TechniqueContract):
    arguments = {"stages": [3], "form": "growth"}

    def build(self):
        return Stacking([3], form="growth")

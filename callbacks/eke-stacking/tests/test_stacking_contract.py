from eke.testing import TechniqueContract
from eke_stacking import Stacking


class TestContract(TechniqueContract):
    arguments = {"stages": [4]}
    unseen = {"replaces module tree": "Blocks that wait are skipped and stay in the tree."}

    def build(self):
        return Stacking([4])


class TestContractOfTrueGrowth(TechniqueContract):
    arguments = {"stages": [3], "form": "growth"}
    unseen = {"changes weights": "New blocks come with their weights, and none that was there changes."}

    def build(self):
        return Stacking([3], form="growth")

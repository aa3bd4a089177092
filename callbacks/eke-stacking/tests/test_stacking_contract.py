from eke.testing import TechniqueContract
from eke_stacking import Stacking


class TestContract(TechniqueContract):
    arguments = {"stages": [4]}

    def build(self):
        return Stacking([4])


class TestContractOfTrueGrowth(TechniqueContract):
    arguments = {"stages": [3], "form": "growth"}
    exceptions = {
        "test_it_fails_cleanly": "Blocks that do not run yet have given their weights up, so a run that fails before "
        "the growth leaves the shallow model that it was training.",
    }

    def build(self):
        return Stacking([3], form="growth")

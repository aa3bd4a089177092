from eke.testing import TechniqueContract
from eke_stacking import Stacking


class TestContract(TechniqueContract):
    arguments = {"stages": [4]}
    unseen = {"replaces module tree": "Blocks that wait are skipped and stay in the tree."}

    def build(self):
        return Stacking([4])

    def build_in_zoo(self, animal):
        return Stacking([1], depths=[1])

    def shows(self, plain, seen):
        first, second = (seen.in_blocks([calls]) for calls in seen.calls)
        assert first < plain.in_blocks([plain.calls[0]])
        assert second == plain.in_blocks([plain.calls[1]])
        return f"{first} of {second} calls in blocks before the growth"


class TestContractOfTrueGrowth(TechniqueContract):
    zoo = ("gpt2",)
    arguments = {"stages": [3], "form": "growth"}
    unseen = {"changes weights": "New blocks come with their weights, and none that was there changes."}

    def build(self):
        return Stacking([3], form="growth")

    def build_in_zoo(self, animal):
        return Stacking([1], depths=[1], form="growth")

    def shows(self, plain, seen):
        first, second = (seen.in_blocks([calls]) for calls in seen.calls)
        assert first < second == plain.in_blocks([plain.calls[1]])
        return ""

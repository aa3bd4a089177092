"""On every model of the zoo, on one process: what is divided among several is the same run."""

from eke.testing import ZooContract
from eke_zero import ZeRO


class TestStageOneInTheZoo(ZooContract):
    def build_in_zoo(self, animal):
        return ZeRO(stage=1)

    def shows(self, plain, seen):
        assert seen.losses == plain.losses
        return ""


class TestStageThreeInTheZoo(TestStageOneInTheZoo):
    zoo = ("gpt2", "t5", "vit")

    def build_in_zoo(self, animal):
        return ZeRO(stage=3)

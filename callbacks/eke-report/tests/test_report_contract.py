from eke.testing import TechniqueContract
from eke_report import Report


class TestContract(TechniqueContract):
    arguments = {"start": 2, "rounds": 2, "block": 2, "ceilings": False, "file": ""}

    def build(self):
        return Report(**self.arguments)

    def shows(self, plain, seen):
        assert seen.technique.result is not None
        assert seen.losses == plain.losses
        return ""

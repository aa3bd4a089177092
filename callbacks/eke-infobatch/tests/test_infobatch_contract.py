from eke.testing import TechniqueContract
from eke_infobatch import InfoBatch


class TestContract(TechniqueContract):
    arguments = {"ratio": 0.3}
    unseen = {"changes learning rate": "Rates keep pace where an epoch has fewer batches; these have smaller ones."}
    extra_calls = 36  # the seam around each step

    def build(self):
        return InfoBatch(0.3, anneal=0.3)

    def idle(self):
        return InfoBatch(0.0)

    zoo_run = {"epochs": 2, "batches": 6}  # of one sample each, some models: of two, none can be left out

    def build_in_zoo(self, animal):
        return InfoBatch(0.9, anneal=0.0)

    def shows(self, plain, seen):
        assert seen.in_blocks() < plain.in_blocks()
        return seen.share_of(plain)

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

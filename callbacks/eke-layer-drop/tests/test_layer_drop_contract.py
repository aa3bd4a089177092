from eke.testing import TechniqueContract
from eke_layer_drop import LayerDrop


class TestContract(TechniqueContract):
    arguments = {"keep": 0.5, "gamma": 0.5}

    def build(self):
        return LayerDrop(0.5, gamma=0.5)

    def idle(self):
        return LayerDrop(1.0)


class TestContractOfStochasticDepth(TechniqueContract):
    arguments = {"keep": 0.6, "schedule": "constant"}

    def build(self):
        return LayerDrop(0.6, schedule="constant")

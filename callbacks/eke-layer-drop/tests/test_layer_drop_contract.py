from eke.testing import TechniqueContract
from eke_layer_drop import LayerDrop


class TestContract(TechniqueContract):
    arguments = {"keep": 0.5, "gamma": 0.5}

    def build(self):
        return LayerDrop(0.5, gamma=0.5)

    def idle(self):
        return LayerDrop(1.0)

    def build_in_zoo(self, animal):
        return LayerDrop(0.3, schedule="constant")

    def shows(self, plain, seen):
        ran, all_of_them = seen.in_blocks(seen.calls), plain.in_blocks(plain.calls)
        assert ran < all_of_them
        return f"{ran} of {all_of_them} calls in blocks"


class TestContractOfStochasticDepth(TechniqueContract):
    zoo = ("gpt2",)
    arguments = {"keep": 0.6, "schedule": "constant"}

    def build(self):
        return LayerDrop(0.6, schedule="constant")

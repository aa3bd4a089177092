from eke.testing import TechniqueContract, TinyViT
from eke_resolution import Resolution


class TestContract(TechniqueContract):
    model = TinyViT
    shapes = (TinyViT,)
    extra_calls = 30  # the seam around each step
    arguments = {"start": 0.5, "hold": 0.2, "tail": 0.3}

    def build(self):
        return Resolution(0.5, hold=0.2, tail=0.3)

    def idle(self):
        return Resolution(1.0)

    def shows(self, plain, seen):
        assert 0 < seen.in_blocks() < plain.in_blocks()
        return seen.share_of(plain)


class TestContractOfPatches(TestContract):
    zoo = ("vit",)
    arguments = {"start": 0.5, "mode": "patches"}
    unseen = {"changes batch content": "Patches change, images do not."}

    def build(self):
        return Resolution(0.5, mode="patches")

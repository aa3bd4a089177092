from eke.testing import TechniqueContract, TinyViT
from eke_token_merge import TokenMerge


class TestContract(TechniqueContract):
    model = TinyViT
    shapes = (TinyViT,)
    arguments = {"count": 2}

    def build(self):
        return TokenMerge(2)

    def idle(self):
        return TokenMerge(0)

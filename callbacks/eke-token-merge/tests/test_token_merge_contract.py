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

    def build_in_zoo(self, animal):
        return TokenMerge(1)

    def shows(self, plain, seen):
        assert 0 < seen.in_blocks() < plain.in_blocks()
        return seen.share_of(plain)

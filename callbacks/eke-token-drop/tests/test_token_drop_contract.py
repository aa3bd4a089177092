from eke.testing import TechniqueContract, TinyViT
from eke_token_drop import TokenDrop


class TestContract(TechniqueContract):
    model = TinyViT
    extra_calls = 30  # the seam around each step
    shapes = (TinyViT,)
    arguments = {"drop": 0.5, "tail": 0.2}

    def build(self):
        return TokenDrop(0.5, tail=0.2)

    def idle(self):
        return TokenDrop(0.0)

    def shows(self, plain, seen):
        assert 0 < seen.in_blocks() < plain.in_blocks()
        return seen.share_of(plain)

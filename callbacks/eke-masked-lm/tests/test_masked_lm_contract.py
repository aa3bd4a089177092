from eke.testing import TechniqueContract, TinyBlocks, TinyTransformer
from eke.testing.data import VOCABULARY
from eke.testing.zoo import MASK
from eke_masked_lm import MaskedLM

LAST = VOCABULARY - 1


class TestContract(TechniqueContract):
    shapes = (TinyBlocks, TinyTransformer)
    arguments = {"mask_token": LAST, "vocabulary": VOCABULARY, "share": 0.4}

    def build(self):
        return MaskedLM(LAST, VOCABULARY, share=0.4)

    def build_in_zoo(self, animal):
        return MaskedLM(MASK, 17, share=0.4)

    def shows(self, plain, seen):
        assert seen.losses != plain.losses
        return ""


class TestContractOfSpansAndASparseHead(TestContract):
    zoo = ("flat",)
    shapes = (TinyBlocks, TinyTransformer)
    arguments = {"mask_token": LAST, "vocabulary": VOCABULARY, "unit": "span", "head": "head"}

    def build(self):
        return MaskedLM(LAST, VOCABULARY, share=0.4, unit="span", head="head")

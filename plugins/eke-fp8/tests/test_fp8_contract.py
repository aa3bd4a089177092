from eke.testing import TechniqueContract, TinyBlocks, TinyTransformer, TinyViT
from eke_fp8 import FP8


class TestContract(TechniqueContract):
    shapes = (TinyBlocks, TinyTransformer, TinyViT)  # GPT-2's Conv1D is no nn.Linear
    arguments = {"recipe": "delayed"}

    def build(self):
        return FP8("delayed", history=4)

    def shows(self, plain, seen):
        assert seen.losses != plain.losses
        assert {path: weight.shape for path, weight in seen.weights.items()} == {
            path: weight.shape for path, weight in plain.weights.items()
        }
        return ""


class TestContractOfTensorwise(TechniqueContract):
    zoo = ("gpt2",)
    shapes = (TinyBlocks, TinyTransformer, TinyViT)
    arguments = {"stochastic": True, "backend": "emulation"}

    def build(self):
        return FP8(stochastic=True, backend="emulation")

from typing import ClassVar

from eke.testing import TechniqueContract, checks
from eke.testing.models import SHAPES, TinyBlocks
from eke_peft import PEFT

FROZEN = ("*base_layer*", "*in_proj*", "*blocks.*.bias", "*norm1*", "*norm2*", "*blocks*norm*", "*layers*", "*.h.*")


class Pretrained(TinyBlocks):
    """The same weights in each process, as if they came from a file. Only what trains begins elsewhere."""

    def __init__(self, dropout=0.0, seed=0, layers=4):
        super().__init__(dropout=dropout, seed=0, layers=layers)


class TestPEFT(TechniqueContract):
    model = Pretrained
    shapes = SHAPES
    frozen = FROZEN
    unseen: ClassVar = {"changes optimizer": "Only lr_ratio= (LoRA+) divides its groups."}
    arguments: ClassVar = {"method": "lora", "settings": {"r": 4}, "train": ["embed*", "norm*", "head*", "pos*"]}

    def build(self):
        return PEFT(settings={"r": 4}, train=["embed*|pos*|norm.*|head*|*wte*|*wpe*|*ln_f*|cls*|patch*"])

    def test_a_command_line_builds_it(self):  # which cannot import a model from this file
        checks.a_command_line_builds_it(self.subject(model=TinyBlocks))

    def build_in_zoo(self, animal):
        return PEFT(settings={"r": 2})

    def shows(self, plain, seen):
        assert 0 < seen.trained < plain.trained
        before = dict(seen.animal.build(0).named_parameters())
        frozen = [path for path, weight in seen.model.named_parameters() if not weight.requires_grad and path in before]
        assert all(seen.weights[path].equal(before[path]) for path in frozen)
        return f"{seen.trained} of {seen.parameters} parameters train"

"""An initialization: each matrix of the blocks begins orthogonal, scaled by the depth."""

import torch
from eke import Technique, TechniqueCallback
from eke.seams.blocks import find_blocks


class Orthogonal(TechniqueCallback):
    technique = Technique(name="orthogonal", kind="callback", effects=("replaces weights",), exactness="model-changing")

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def initialize(self, run):
        blocks = find_blocks(run.module)
        for block in blocks:
            for weight in block.parameters():
                if weight.ndim == 2:
                    gain = self.gain / len(blocks) ** 0.5
                    torch.nn.init.orthogonal_(weight, gain, generator=run.generator)

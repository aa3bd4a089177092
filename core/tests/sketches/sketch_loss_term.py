"""A loss term: the mean square of what each block puts out, kept small."""

from eke import Technique, TechniqueCallback
from eke.seams.blocks import find_blocks


class SmallActivations(TechniqueCallback):
    technique = Technique(name="small", kind="callback", effects=("changes loss",), exactness="model-changing")

    def __init__(self, weight: float = 0.01, blocks: str | None = None) -> None:
        self.weight, self.blocks = weight, blocks

    def alter_model(self, run):
        def measure(block, inputs, output):
            hidden = output[0] if isinstance(output, tuple) else output
            run.add_loss(self.weight * hidden.float().square().mean(), "activations")

        for block in find_blocks(run.module, self.blocks):
            run.at_end(block.register_forward_hook(measure).remove)

"""Recomputing of spans: two blocks at a time keep their input alone and run again in backward."""

from eke import Technique, TechniqueCallback
from eke.seams.blocks import find_blocks
from eke.seams.recompute import recompute, spans


class RecomputePairs(TechniqueCallback):
    technique = Technique(name="recompute_pairs", kind="callback", effects=("changes saved tensors",))

    def __init__(self, length: int = 2):
        self.length = length

    def alter_model(self, run):
        if run.fitting:
            blocks = find_blocks(run.module)
            done = recompute(blocks.modules, spans(len(blocks), self.length), owner=run.name, model=run.module)
            run.at_end(done.undo)

"""A schedule: linear warm-up, then as high as it was, then down to zero (WSD), by shares of the run."""

from eke import Technique, TechniqueCallback
from torch.optim.lr_scheduler import LambdaLR


class WarmStableDecay(TechniqueCallback):
    technique = Technique(name="wsd", kind="callback", effects=("replaces learning rate",), exactness="model-changing")

    def __init__(self, warm: float = 0.1, decay: float = 0.3) -> None:
        self.warm, self.decay = warm, decay

    def check(self, run):
        if run.fitting:
            run.until(float(self.warm), "warm")  # shares of a run of unknown length are refused before it begins

    def alter_schedulers(self, run, optimizers, schedulers):
        def rate(step: int) -> float:
            share = step / run.length
            return min(1.0, (share + 1e-3) / self.warm, (1.001 - share) / self.decay)

        return [{"scheduler": LambdaLR(one, rate), "interval": "step"} for one in optimizers]

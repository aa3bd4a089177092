"""Averages of the weights for validation and saved models: EMA, SWA, LAWA."""

from eke import Technique, TechniqueCallback
from eke.seams.averages import LatestAverage, RunningAverage, ema, equal


class Average(TechniqueCallback):
    """``kind`` is ``"ema"``, ``"swa"`` or ``"lawa"``: Polyak's mean, the equal one from ``start`` on, the last five."""

    technique = Technique(name="average", kind="callback", effects=("reads weights", "replaces weights-at-eval"),
                          tolerates=("sharded parameters", "sharded optimizer"))  # fmt: skip

    def __init__(self, kind: str = "ema", start: float = 0.25):
        self.kind, self.start, self.average = kind, start, None

    def check(self, run):
        if not run.fitting:
            return
        kinds = {"ema": lambda m: RunningAverage(m, ema(0.9)), "swa": lambda m: RunningAverage(m, equal()),
                 "lawa": lambda m: LatestAverage(m, 5)}  # fmt: skip
        self.average, self.begin = kinds[self.kind](run.module), run.until(self.start, "start")

    def after_optimizer_step(self, run, optimizer):
        if self.begin.reached:
            self.average.update()

    def eval_weights(self):
        return self.average.weights() if self.average is not None and self.average.updates else None

    def alter_checkpoint(self, checkpoint):
        if self.average is not None:
            state = self.average.state_dict(checkpoint, self.technique.name)
            checkpoint["eke"]["techniques"][self.technique.name]["state"] = state

    def load_state_dict(self, state):
        if self.average is not None:
            self.average.load_state_dict(state, self.run.trainer.ckpt_path)

    def __getstate__(self):
        return {**super().__getstate__(), "average": None, "begin": None}

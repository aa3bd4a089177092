"""A sketch against the core: validation and saved models have an average of the weights."""

import eke
import pytest
from eke.seams.averages import LatestAverage, RunningAverage, ema, equal
from eke.testing import TechniqueContract


# --- sketch
class Average(eke.TechniqueCallback):
    """``kind`` is ``"ema"``, ``"swa"`` or ``"lawa"``: Polyak's mean, the equal one from ``start`` on, the last five."""

    technique = eke.Technique(name="average", kind="callback", effects=("reads weights", "replaces weights-at-eval"))

    def __init__(self, kind: str = "ema", start: float = 0.25):
        self.kind, self.start, self.average, self.saved = kind, start, None, None

    def alter_model(self, run):
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


# --- end of sketch


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(eke, "get", lambda name: Average.technique)


class TestContract(TechniqueContract):
    exceptions = {"test_it_costs_nothing_when_it_has_nothing_to_do": "it takes each step's weights into its mean"}

    def build(self):
        return Average()

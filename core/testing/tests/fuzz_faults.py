"""Techniques with faults that a random run has to find, beside those in faulty.py."""

from eke import ConflictError, EkeError, Technique
from faulty import GradientNoise


class RefusesLate(GradientNoise):
    """Says after three batches what it could have said before the first."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            raise EkeError("RefusesLate cannot work with a fourth batch. Give it three.")


class RefusesAtOnce(GradientNoise):
    """Refuses every run."""

    def check(self, run):
        raise ConflictError("RefusesAtOnce cannot work with this model. Give it another one.")


class Stumbles(GradientNoise):
    """Ends in Python's words."""

    def on_train_batch_end(self, *args):
        return {}["nothing"]


class CountsWindows(GradientNoise):
    """Weighs the loss by the batch's place in its window and saves no place: seen within windows alone."""

    technique = Technique(name="counts_windows", kind="callback", effects=("changes gradients", "changes loss"))
    place = 0

    def around_step(self, run, call_next, batch, *args):
        weight = 1 + self.place
        self.place = (self.place + 1) % run.trainer.accumulate_grad_batches
        return call_next(batch, *args) / weight


class DriftsApart(GradientNoise):
    """Makes larger steps in each further process."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for weight in pl_module.parameters():
            weight.grad.mul_(1 + trainer.global_rank)


class TellsByTheHash(GradientNoise):
    """Goes by Python's hash of a word, which every Python that is started anew makes another."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for weight in pl_module.parameters():
            weight.grad.mul_(1 + hash("weight") % 1009)

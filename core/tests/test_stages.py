"""Which batches a technique gets to change, and when it learns how long epochs are."""

from typing import ClassVar

import torch
from eke import Technique, TechniqueCallback
from eke.testing import TinyBlocks, fit
from eke.testing.models import STEPS
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader


class Marks(TechniqueCallback):
    """Adds to the second part of each batch: 1000 in training, 2000 in evaluation."""

    technique: ClassVar[Technique] = Technique(name="marks", kind="callback", effects=("changes batch content",))

    def __init__(self):
        self.started = []

    def alter_batch(self, run, batch):
        return batch[0], batch[1] + 1000

    def alter_eval_batch(self, run, batch):
        return batch[0], batch[1] + 2000

    def on_train_start(self, trainer, pl_module):
        self.started.append("on_train_start")

    def begin_samples(self, run):
        trainer = run.trainer
        self.started.append(f"begin_samples of {trainer.num_training_batches}")


class Looks(TinyBlocks):
    def __init__(self):
        super().__init__()
        self.seen = {"train": set(), "val": set(), "test": set(), "predict": set()}

    def look(self, stage, batch):
        self.seen[stage].add(int(batch[1].max()) // 1000)

    def training_step(self, batch, batch_idx):
        self.look("train", batch)
        return super().training_step((batch[0], batch[1] - 1000), batch_idx)

    def validation_step(self, batch, batch_idx):
        self.look("val", batch)

    def test_step(self, batch, batch_idx):
        self.look("test", batch)

    def predict_step(self, batch, batch_idx):
        self.look("predict", batch)


def test_training_and_evaluation_have_a_batch_seam_each_and_prediction_none():
    model, marks = Looks(), Marks()
    fit(model, marks, epochs=1, validate=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    alone = Trainer(callbacks=[Marks()], enable_model_summary=False, **quiet)
    alone.test(model, model.test_dataloader(), verbose=False)
    alone.predict(model, DataLoader(model.test_dataloader().dataset, 2))
    assert model.seen == {"train": {1}, "val": {2}, "test": {2}, "predict": {0}}
    assert "on_after_batch_transfer" not in vars(model)


def test_samples_begin_after_every_technique_has_seen_the_full_length():
    marks = Marks()
    fit(TinyBlocksOf(), marks, epochs=1)
    assert marks.started == ["on_train_start", f"begin_samples of {STEPS}"]


class TinyBlocksOf(TinyBlocks):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0], (batch[1] - 1000).to(torch.int64)), batch_idx)

import functools

import eke
import pytest
import torch
from eke.seams.step import muted, replay, step_arguments
from eke.testing import run_ranks
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.logged = 0

    def log(self, *args, **kwargs):
        self.logged += 1

    def training_step(self, batch, batch_idx):
        loss = (self.layer(batch[0]).squeeze(1) - batch[1]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


GENERATOR = torch.Generator().manual_seed(2)
X, Y = torch.randn(16, 4, generator=GENERATOR), torch.randn(16, generator=GENERATOR)


def fit(*callbacks, batch=2, **options):
    model = Net()
    silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=list(callbacks), **silent, **options)
    trainer.fit(model, DataLoader(TensorDataset(X, Y), batch_size=batch))
    return model


class OtherName(Net):
    def training_step(self, batch, i):
        return super().training_step(batch, i)


class Rest(Net):
    def training_step(self, *everything):
        return super().training_step(*everything)


class BatchAlone(Net):
    def training_step(self, batch):
        return super().training_step(batch, 0)


@pytest.mark.parametrize(("model", "given"), [(Net, 2), (OtherName, 2), (Rest, 2), (BatchAlone, 1)])
def test_a_step_gets_the_index_by_its_place_and_not_by_its_name(model, given):
    """What Lightning itself hands over is the judge."""
    assert step_arguments(model(), "batch", 7) == ("batch", 7)[:given]
    seen = []

    class Watch(model):
        def __init__(self):
            super().__init__()
            step = super().training_step
            self.training_step = functools.wraps(step)(lambda *given: seen.append(len(given)) or step(*given))

    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    Trainer(accelerator="cpu", max_steps=1, **options).fit(Watch(), DataLoader(TensorDataset(X, Y), batch_size=2))
    assert seen == [given]


RADIUS = 0.05


def ascend(parameters):
    """SAM's first half: go to the worst point within a radius. Returns the way there."""
    gradients = [parameter.grad.clone() for parameter in parameters]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    steps = [RADIUS * gradient / norm for gradient in gradients]
    with torch.no_grad():
        for parameter, step in zip(parameters, steps, strict=True):
            parameter.add_(step)
    return steps


class Sam(eke.TechniqueCallback):
    """Two passes a step, by the step seam."""

    technique = eke.Technique(name="sam", kind="callback", effects=("changes gradients",))

    def __init__(self):
        self.window = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.window.append((batch, batch_idx))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        parameters = list(pl_module.parameters())
        steps = ascend(parameters)
        optimizer.zero_grad()
        replay(trainer, pl_module, self.window)
        with torch.no_grad():
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.sub_(step)
        self.window = []


def sam_by_hand(batch):
    model = Net()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for start in range(0, 16, batch):
        x, y = X[start : start + batch], Y[start : start + batch]

        def backward(x=x, y=y):
            optimizer.zero_grad()
            (model.layer(x).squeeze(1) - y).square().mean().backward()

        backward()
        steps = ascend(parameters)
        backward()
        with torch.no_grad():
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.sub_(step)
        optimizer.step()
    return model


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_replayed_window_gives_the_gradient_of_the_whole_window(accumulate):
    ours = fit(Sam(), batch=2, accumulate_grad_batches=accumulate)
    torch.testing.assert_close(ours.state_dict(), sam_by_hand(2 * accumulate).state_dict(), rtol=1e-6, atol=1e-7)


def test_the_replay_logs_nothing():
    assert fit(Sam()).logged == fit().logged


def test_replays_on_two_processes_are_reduced_once():
    def one(rank):
        model = fit(Sam(), batch=2, accumulate_grad_batches=2, devices=2, strategy="ddp", use_distributed_sampler=False)
        return [weight.tolist() for weight in model.parameters()]

    # both ranks see the same data here, so the mean over ranks is what one process has
    expected = [weight.tolist() for weight in fit(Sam(), batch=2, accumulate_grad_batches=2).parameters()]
    for rank in run_ranks(one):
        torch.testing.assert_close(rank, expected)


def test_muting_ends_with_its_block_even_after_an_error():
    model = Net()
    with pytest.raises(ZeroDivisionError), muted(model):
        model.log("a", 1 / 0)
    model.log("a", 1)
    assert model.logged == 1


class Reads(eke.TechniqueCallback):
    technique = eke.Technique(name="reads", kind="callback")
    counts = ("samples", "tokens")

    def __init__(self):
        self.trace = []

    def on_train_batch_start(self, *_):
        self.trace.append((self.progress.steps, self.progress.micro_steps, self.progress.at_boundary))


def test_steps_and_windows_under_accumulation():
    reads = Reads()
    fit(reads, batch=2, accumulate_grad_batches=3)  # 8 batches: windows of 3, 3 and, at the epoch's end, 2
    assert reads.trace == [
        (0, 0, True),
        (0, 1, False),
        (0, 2, False),
        (1, 3, True),
        (1, 4, False),
        (1, 5, False),
        (2, 6, True),
        (2, 7, False),
    ]
    assert reads.progress.steps == 3


def test_samples_and_tokens_of_all_processes_are_counted():
    class Tokens(LightningModule):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(8, 2)

        def training_step(self, batch, batch_idx):
            return self.embed(batch["ids"]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def one(rank):
        reads = Reads()
        data = [{"ids": torch.zeros(5, dtype=torch.long), "labels": torch.zeros(5, dtype=torch.long)}] * 12
        silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        parallel = {"devices": 2, "strategy": "ddp"} if rank is not None else {}
        trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[reads], **silent, **parallel)
        trainer.fit(Tokens(), DataLoader(data, batch_size=2))
        return reads.progress.samples, reads.progress.tokens

    assert one(None) == (12, 60)
    assert run_ranks(one) == [(12, 60), (12, 60)]


def test_a_strategy_that_accumulates_by_itself_counts_real_steps():
    from eke.seams.progress import Progress

    class Strategy:
        handles_gradient_accumulation = True

    class Run:  # DeepSpeed cannot run here: its counting is what is tested
        strategy, accumulate_grad_batches, global_step = Strategy(), 4, 10

    progress = Progress()
    progress.connect(Run())
    assert progress.steps == 2

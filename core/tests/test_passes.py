"""A second pass over a window: the gradient it gives, and that everything else sees one step."""

import eke
import pytest
import torch
from eke.seams import interceptor
from eke.seams.step import muted
from eke.testing import run_ranks
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import CatMetric, MeanMetric, MeanSquaredError, MetricCollection

GENERATOR = torch.Generator().manual_seed(2)
X, Y = torch.randn(16, 4, generator=GENERATOR), torch.randn(16, generator=GENERATOR)
RADIUS = 0.05
SILENT = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


class Net(LightningModule):
    def __init__(self, dropout=0.0, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.drop = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.logged = 0

    def log(self, *args, **kwargs):
        self.logged += 1

    def training_step(self, batch, batch_idx):
        x = self.norm(batch[0])
        for block in self.blocks:
            x = x + 0.1 * block(x)
        loss = (self.layer(self.drop(x)).squeeze(1) - batch[1]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(*callbacks, batch=2, model=None, ckpt=None, **options):
    model = model or Net()
    trainer = Trainer(accelerator="cpu", callbacks=list(callbacks), **SILENT, **{"max_epochs": 1, **options})
    torch.manual_seed(5)
    trainer.fit(model, DataLoader(TensorDataset(X, Y), batch_size=batch), ckpt_path=ckpt)
    return model


def ascend(parameters, radius=RADIUS):
    """SAM's first half: go to the worst point within a radius. Returns the way there."""
    gradients = [parameter.grad.clone() for parameter in parameters]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    steps = [radius * gradient / norm for gradient in gradients]
    with torch.no_grad():
        for parameter, step in zip(parameters, steps, strict=True):
            parameter.add_(step)
    return steps


class Sam(eke.TechniqueCallback):
    """Two passes a step."""

    technique = eke.Technique(name="sam", kind="callback", effects=("changes gradients",))
    passes = 2

    def __init__(self, radius=RADIUS):
        self.radius = radius

    def before_optimizer_step(self, run, optimizer):
        parameters = [one for one in run.module.parameters() if one.grad is not None]
        steps = ascend(parameters, self.radius)
        run.second_pass()
        with torch.no_grad():
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.sub_(step)


def sam_by_hand(batch):
    model = Net()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for start in range(0, 16, batch):

        def backward(start=start):
            optimizer.zero_grad()
            model.training_step((X[start : start + batch], Y[start : start + batch]), 0).backward()

        backward()
        steps = ascend(parameters)
        backward()
        with torch.no_grad():
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.sub_(step)
        optimizer.step()
    return model


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_second_pass_gives_the_gradient_of_the_whole_window(accumulate):
    ours = fit(Sam(), batch=2, accumulate_grad_batches=accumulate)
    torch.testing.assert_close(ours.state_dict(), sam_by_hand(2 * accumulate).state_dict(), rtol=1e-6, atol=1e-7)


def test_it_logs_nothing():
    assert fit(Sam()).logged == fit().logged


class Notes(Net):
    """Meters itself in training_step, as people do."""

    def __init__(self):
        super().__init__()
        self.error = MeanSquaredError()
        self.each = MetricCollection({"mean": MeanMetric(), "all": CatMetric()})
        self.losses, self.by_batch, self.steps, self.total = [], {}, 0, torch.zeros(())
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.error(self.layer(batch[0]).squeeze(1).detach(), batch[1])
        self.each.update(loss.detach())
        self.losses.append(float(loss))
        self.by_batch.setdefault(batch_idx, []).append(1)
        self.steps += 1
        self.total += 1
        return loss

    def on_train_batch_end(self, *args):
        each = self.each.compute()
        read = self.error.compute(), each["mean"], each["all"].clone()
        self.seen.append((*read, list(self.losses), len(self.by_batch), self.steps, float(self.total)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_metrics_and_notes_of_a_step_move_once(accumulate):
    """At rate 0 and radius 0 both passes are alike, so that what is noted is what a plain run notes."""

    class Still(Notes):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    twice, plain = (
        fit(*callbacks, model=Still(), accumulate_grad_batches=accumulate) for callbacks in ((Sam(0.0),), ())
    )
    assert len(plain.seen) == 8
    torch.testing.assert_close(twice.seen, plain.seen, rtol=0, atol=0)


def test_on_two_processes_it_is_reduced_once():
    def one(rank):
        model = fit(Sam(), batch=2, accumulate_grad_batches=2, devices=2, strategy="ddp", use_distributed_sampler=False)
        return [weight.tolist() for weight in model.parameters()]

    # both ranks see the same data here, so the mean over ranks is what one process has
    expected = [weight.tolist() for weight in fit(Sam(), batch=2, accumulate_grad_batches=2).parameters()]
    for rank in run_ranks(one):
        torch.testing.assert_close(rank, expected)


class Draws(eke.TechniqueCallback):
    """Draws from its own generator, from the global one, skips a block, and counts its batches."""

    technique = eke.Technique(name="draws", kind="callback", effects=("changes loss",))

    def __init__(self):
        self.steps, self.counted, self.chosen = [], 0, []

    def alter_model(self, run):
        self.blocks = run.blocks("blocks")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        first, second = self.blocks.now()
        self.blocks.put(second, *([Skip()] if self.run.seed() % 2 else []))

    def on_train_batch_end(self, *_):
        self.blocks.clear()

    def around_step(self, run, call_next, batch, *args):
        self.chosen.append(run.once("choice", lambda: len(self.chosen)))
        if run.first_pass:
            self.counted += 1
        mine, everyones = torch.rand(1, generator=run.generator), torch.rand(1)
        loss = call_next(batch, *args)
        run.add_loss(mine.sum() * run.module.layer.weight.sum() * everyones.sum())
        self.steps.append((mine.item(), everyones.item(), run.first_pass, loss.item()))
        return loss


class Skip(interceptor.Skip):
    def __call__(self, call_next, hidden, args, kwargs, form):
        return torch.zeros_like(hidden)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_beside_two_passes_that_go_nowhere_a_run_is_as_without_them(accumulate):
    """Same draws, same skipped blocks, same dropout, statistics that moved once: not a bit is different."""
    runs = {}
    for name, callbacks in (("one", []), ("two", [Sam(0.0)])):
        draws = Draws()
        model = fit(*callbacks, draws, model=Net(0.5, norm=True), accumulate_grad_batches=accumulate)
        runs[name] = model.state_dict(), draws, torch.rand(3).tolist(), draws.generator.get_state().tolist()
    torch.testing.assert_close(runs["two"][0], runs["one"][0], rtol=0, atol=0)
    assert runs["two"][2:] == runs["one"][2:]
    one, two = runs["one"][1], runs["two"][1]
    assert one.counted == two.counted == 8
    firsts = [step for step in two.steps if step[2]]
    seconds = [step for step in two.steps if not step[2]]
    assert firsts == one.steps
    assert [step[:2] for step in seconds] == [step[:2] for step in firsts]
    assert [step[3] for step in seconds] == [step[3] for step in firsts]  # the losses too: the blocks were the same


def test_a_value_made_once_is_that_of_the_first_pass():
    draws = Draws()
    fit(Sam(), draws, accumulate_grad_batches=2)
    assert draws.chosen[:8] == [0, 1, 0, 1, 4, 5, 4, 5]


@pytest.mark.parametrize("batches", [2, 3])
def test_a_run_cut_within_a_window_ends_where_the_unbroken_one_does(tmp_path, batches):
    class Kill(eke.TechniqueCallback):
        technique = eke.Technique(name="kill", kind="callback")

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if self.die and batch_idx + 1 == batches:
                trainer.save_checkpoint(tmp_path / "a.ckpt")
                raise KeyboardInterrupt

        def __init__(self, die):
            self.die = die

    options = dict(accumulate_grad_batches=4)
    whole = fit(Sam(), Kill(False), model=Net(0.5), **options)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(Sam(), Kill(True), model=Net(0.5), **options)
    rest = fit(Sam(), Kill(False), model=Net(0.5), ckpt=tmp_path / "a.ckpt", **options)
    torch.testing.assert_close(rest.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_under_the_gradient_scaler_gradients_are_unscaled_and_an_overflow_of_the_second_pass_skips_the_step():
    from lightning.pytorch.plugins import MixedPrecision

    class Overflows(Sam):
        def before_optimizer_step(self, run, optimizer):
            super().before_optimizer_step(run, optimizer)
            if run.progress.steps == 3:
                before.extend(weight.clone() for weight in run.module.parameters())

    class Blows(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            again = self.blows and self.trainer.callbacks[0].runs["sam"]._passes.repeating
            return loss * 1e30 * 1e30 if again and self.trainer.global_step == 3 else loss

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = []
    model = Blows()
    model.blows = False
    plain = fit(Sam())
    scaled = fit(
        Sam(), model=model, plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]
    )
    torch.testing.assert_close(scaled.state_dict(), plain.state_dict(), rtol=5e-2, atol=5e-3)
    model = Blows()
    model.blows = True
    fit(Overflows(), model=model, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_steps=4, max_epochs=-1)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_muting_ends_with_its_block_even_after_an_error():
    model = Net()
    with pytest.raises(ZeroDivisionError), muted(model):
        model.log("a", 1 / 0)
    model.log("a", 1)
    assert model.logged == 1

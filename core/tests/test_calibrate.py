"""Batches and gradients before training: the right ones, and a run that goes on to the bits of one without them."""

import eke
import pytest
import torch
from eke.seams.calibrate import CalibrationError, gradients, sample_batches
from eke.seams.trial import TrialError
from eke.testing import TinyBlocks, assert_same, fit, run_ranks, shuffled
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset


class Data(Dataset):
    """Random augmentation, and a data set that remembers what was asked of it."""

    def __init__(self, length=24):
        self.x = torch.randn(length, 4, generator=torch.Generator().manual_seed(2))
        self.asked = 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.asked += 1
        return self.x[index] + 0.1 * torch.randn(4), self.x[index].sum()


class Metric(nn.Module):
    def __init__(self):
        super().__init__()
        self.sum, self.losses, self.calls = torch.zeros(()), [], 0

    def forward(self, loss):
        self.sum += loss
        self.losses.append(loss)
        self.calls += 1


class Net(LightningModule):
    def __init__(self, dropout=0.5):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(dropout), nn.Linear(6, 1))
        self.metric, self.batches = Metric(), []
        self.net[0].bias.requires_grad_(False)

    def training_step(self, batch):  # no batch_idx: Lightning calls it by what it takes
        x, y = batch
        loss = (self.net(x).squeeze(1) - y).square().mean()
        self.metric(loss.detach())
        self.log("loss", loss)
        self.batches.append((x.detach().clone(), y))
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Draws(eke.TechniqueCallback):
    """Changes batches by numbers of its own, and remembers."""

    technique = eke.Technique(
        name="draws", kind="callback", effects=("changes batch content",), exactness="approximate"
    )

    def __init__(self):
        self.seen = []

    def alter_batch(self, run, batch):
        self.seen.append(float(torch.rand((), generator=self.generator)))
        return batch[0] * (1 + self.seen[-1]), batch[1]

    def around_step(self, run, call_next, batch, *args):
        self.seen.append(0.0)
        return call_next(batch, *args)


class Calibrates(Callback):
    def __init__(self, count=2, **options):
        self.count, self.options = count, options

    def on_train_start(self, trainer, pl_module):
        self.batches = sample_batches(trainer, self.count)
        self.gradients = gradients(trainer, pl_module, self.batches, **self.options)


def run(*callbacks, model=None, loader=None, seed=3, **options):
    torch.manual_seed(seed)
    model = model or Net()
    loader = DataLoader(Data(), batch_size=4, shuffle=True) if loader is None else loader
    silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(**{"accelerator": "cpu", "max_epochs": 2, **silent, "callbacks": list(callbacks), **options})
    trainer.fit(model, loader)
    state = {
        "weights": dict(model.state_dict()),
        "moments": trainer.optimizers[0].state_dict(),
        "batches": model.batches,
        "metric": [model.metric.sum, model.metric.losses, model.metric.calls],
        "logged": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "random": torch.get_rng_state(),
        "asked": loader.dataset.asked if isinstance(loader.dataset, Data) else 0,
    }
    return model, state


LOADERS = {
    "workers 0": {},
    "workers 1": {"num_workers": 1},
    "workers that stay": {"num_workers": 2, "persistent_workers": True},
    "generator": {"generator": lambda: torch.Generator().manual_seed(9)},
}


def loader_of(kind):
    options = dict(LOADERS[kind])
    if "generator" in options:
        options["generator"] = options["generator"]()
    return DataLoader(Data(), batch_size=4, shuffle=True, **options)


@pytest.mark.parametrize("kind", LOADERS)
def test_the_run_goes_on_to_the_bits_of_one_without_and_sees_the_batches_that_were_drawn(kind):
    _, plain = run(Draws(), loader=loader_of(kind))
    calibrates, draws = Calibrates(), Draws()
    _, state = run(draws, calibrates, loader=loader_of(kind))
    assert_same(plain, state, "a run without calibration, then with it")
    both = zip(calibrates.batches, state["batches"][:2], draws.seen[::2], strict=False)
    for number, ((x, y), (seen, wanted), factor) in enumerate(both):
        assert torch.equal(y, wanted)  # the same samples
        if number == 0 or "num_workers" in LOADERS[kind]:
            # As the loader gave them, and no technique had changed. Without workers a later batch's augmentation draws
            # from the stream that dropout has drawn from by then.
            assert torch.equal(x * (1 + factor), seen)


def test_without_a_loader_that_eke_resumes_batches_are_drawn_aside_all_the_same():
    _, plain = run()
    calibrates = Calibrates()
    _, state = run(calibrates)
    assert_same(plain, state, "a run without calibration, then with it")
    assert [tuple(x.shape) for x, _ in calibrates.batches] == [(4, 4), (4, 4)]


def test_a_loader_without_length_and_several_loaders_are_drawn_from():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from Data()

    _, plain = run(Draws(), loader=DataLoader(Stream(), batch_size=4))
    _, state = run(Draws(), Calibrates(), loader=DataLoader(Stream(), batch_size=4))
    assert_same(plain, state, "a run without calibration, then with it")

    class Two(Net):
        def training_step(self, batch):
            return super().training_step(batch["one"]) + super().training_step(batch["two"])

        def train_dataloader(self):
            return {"one": loader_of("workers 0"), "two": loader_of("generator")}

    found = []
    for callbacks in ([Draws2()], [Draws2(), Calibrates()]):
        torch.manual_seed(3)
        model = Two()
        silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        Trainer(accelerator="cpu", max_epochs=2, callbacks=callbacks, **silent).fit(model)
        found.append([dict(model.state_dict()), model.batches])
    assert_same(*found, "a run of two loaders without calibration, then with it")


class Draws2(eke.TechniqueCallback):
    technique = eke.Technique(name="draws2", kind="callback")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "fp16"])
def test_gradients_are_those_of_the_mean_loss(precision):
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))] if precision == "fp16" else []
    options = {"plugins": plugins} if plugins else {"precision": precision}
    _, plain = run(model=Net(), **options if not plugins else {"plugins": [*map(_twin, plugins)]})
    calibrates = Calibrates(evaluate=True)
    _, state = run(calibrates, model=Net(), **options)
    assert_same(plain, state, "a run without calibration, then with it")
    model = Net().eval()
    loss = sum((model.net(x).squeeze(1) - y).square().mean() for x, y in calibrates.batches) / 2
    loss.backward()
    wanted = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    assert "net.0.bias" not in wanted
    tolerance = 1e-6 if precision == "32-true" else 0.05
    torch.testing.assert_close(calibrates.gradients, wanted, rtol=tolerance, atol=tolerance)


def _twin(plugin):
    return type(plugin)(plugin.precision, plugin.device, torch.amp.GradScaler("cpu"))


def test_gradients_that_overflow_in_half_precision_are_taken_with_a_smaller_scale():
    class Steep(Net):
        def training_step(self, batch):
            return 1000 * super().training_step(batch)

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20))
    calibrates = Calibrates(evaluate=True)
    run(calibrates, model=Steep(), plugins=[plugin], max_steps=1)
    assert all(one.isfinite().all() for one in calibrates.gradients.values())
    assert any(one.abs().max() > 100 for one in calibrates.gradients.values())
    assert plugin.scaler.get_scale() < 2.0**20  # the run's own first step overflowed as it would have


def test_dropout_is_on_unless_evaluation_is_asked_for():
    on, off = Calibrates(), Calibrates(evaluate=True)
    run(on), run(off)
    assert any(not torch.equal(on.gradients[name], off.gradients[name]) for name in on.gradients)


def test_frozen_parameters_have_a_gradient_where_they_are_named_and_stay_frozen():
    calibrates = Calibrates(names=["net.0.*"])
    model, state = run(calibrates)
    _, plain = run()
    assert set(calibrates.gradients) == {"net.0.weight", "net.0.bias"}
    assert not model.net[0].bias.requires_grad
    assert_same(plain, state, "a run without calibration, then with it")


def test_gradients_that_are_there_stay():
    class Within(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:  # half of a window's gradient is there
                gradients(trainer, pl_module, sample_batches(trainer, 1))

    _, plain = run(accumulate_grad_batches=2)
    _, state = run(Within(), accumulate_grad_batches=2)
    assert_same(plain, state, "a run without calibration, then with one in mid-window")


def test_all_processes_have_the_mean_over_their_batches_and_go_on_as_without():
    class Sums(Callback):
        def on_train_start(self, trainer, pl_module):
            self.batches = sample_batches(trainer, 2)
            self.gradients = gradients(trainer, pl_module, self.batches, evaluate=True)

    def one(rank, *callbacks):
        done = fit(TinyBlocks(dropout=0.1), Draws2(), world=2, callbacks=callbacks, loader=shuffled)
        return done.state

    def with_it(rank):
        sums = Sums()
        return one(rank, sums), sums.gradients, sums.batches

    plain = run_ranks(one)
    first, second = run_ranks(with_it)
    assert_same(plain, [first[0], second[0]], "two processes without calibration, then with it")
    assert_same(first[1], second[1], "gradients of one process, then of the other")
    model = TinyBlocks().eval()
    (sum(model.loss(batch) for batch in [*first[2], *second[2]]) / 4).backward()
    wanted = {name: one.grad for name, one in model.named_parameters()}
    torch.testing.assert_close(first[1], wanted, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_users_own_and_not_what_techniques_make_of_it():
    class Doubles(Draws2):
        def around_step(self, run, call_next, batch, *args):
            return 2 * call_next(batch, *args)

    doubled, plain = Calibrates(evaluate=True), Calibrates(evaluate=True)
    run(Doubles(), doubled), run(Draws2(), plain)
    assert_same(plain.gradients, doubled.gradients, "gradients beside a technique that changes the loss")


def test_the_reducer_of_ddp_sees_nothing_of_the_pass():
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    class Counts(Callback):
        def on_train_start(self, trainer, pl_module):
            self.reduced = 0
            trainer.strategy.model.register_comm_hook(None, self.count)
            gradients(trainer, pl_module, sample_batches(trainer, 2))
            self.by_calibration = self.reduced

        def count(self, state, bucket):
            self.reduced += 1
            return allreduce_hook(state, bucket)

    def one(rank):
        fit(TinyBlocks(), Draws2(), world=2, callbacks=[counts := Counts()])
        return counts.by_calibration, counts.reduced > 0

    assert run_ranks(one) == [(0, True), (0, True)]


def test_what_cannot_be_had_is_refused_in_words():
    class Early(Callback):
        def setup(self, trainer, pl_module, stage):
            sample_batches(trainer, 1)

    with pytest.raises(CalibrationError, match="no loaders yet. Ask for batches in on_train_start"):
        run(Early())
    with pytest.raises(CalibrationError, match="an epoch has 6 batches here, and 9 were asked for"):
        run(Calibrates(9))
    with pytest.raises(CalibrationError, match="names='nett.\\*' meets no name. Near"):
        run(Calibrates(names="nett.*"))
    with pytest.raises(CalibrationError, match="batches is empty"):
        run(Calibrates(0))

    class Broken(Data):
        def __getitem__(self, index):
            raise KeyError("no such file")

    with pytest.raises(CalibrationError, match="could not be drawn:(.|\n)*no such file"):
        run(Calibrates(), loader=DataLoader(Broken(), batch_size=4))

    class Endless(Data):
        def __getitem__(self, index):
            while True:
                pass

    class Waits(Callback):
        def on_train_start(self, trainer, pl_module):
            sample_batches(trainer, 1, timeout=0.2)

    with pytest.raises(CalibrationError, match="1 batches were not drawn in 0.2 s"):
        run(Waits(), loader=DataLoader(Endless(), batch_size=4))

    class Skips(Net):
        def training_step(self, batch):
            return None

    with pytest.raises(CalibrationError, match="gave no loss for batch 0"):
        run(Calibrates(), model=Skips())

    class Explodes(Net):
        def training_step(self, batch):
            return super().training_step(batch) * float("inf")

    with pytest.raises(CalibrationError, match="the gradient of 'net.0.weight' is not finite"):
        run(Calibrates(), model=Explodes())

    class Engine(SingleDeviceStrategy):
        handles_gradient_accumulation = True

    with pytest.raises(TrialError, match="Engine runs backward and the optimizer in an engine of its own"):
        run(Calibrates(), strategy=Engine("cpu"))

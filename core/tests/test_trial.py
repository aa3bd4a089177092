"""Trials of steps: what they measure, and that the run goes on to the bits of one that never tried anything."""

import random
from collections import OrderedDict, deque

import eke
import numpy
import pytest
import torch
from eke.seams import trial as seam
from eke.seams.calibrate import sample_batches
from eke.seams.trial import (
    Snapshot,
    TrialError,
    compare,
    differ,
    interleave,
    rolled_back,
    switch_off,
    switch_on,
    take_step,
    trial,
    turns,
)
from eke.testing import TinyBlocks, assert_same, fit, run_ranks, shuffled
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn


class Thing:
    pass


def test_a_snapshot_puts_every_kind_of_content_back_in_the_same_objects():
    thing, inner = Thing(), Thing()
    thing.list, thing.deque, thing.set = [1, [2]], deque([1, 2], maxlen=2), {1, 2}
    thing.dict, thing.ordered = {"a": 1, "b": {"c": 2}}, OrderedDict(x=1, y=2)
    thing.tuple, thing.number, thing.inner = ([7],), 3, inner
    thing.tensor, thing.array = torch.tensor([0.0, -0.0, float("nan")]), numpy.arange(3)
    thing.torch, thing.python = torch.Generator().manual_seed(1), random.Random(1)
    thing.numpy, thing.old_numpy = numpy.random.default_rng(1), numpy.random.RandomState(1)
    inner.loop = thing
    snapshot = Snapshot(thing)

    def draws():
        return (
            torch.rand((), generator=thing.torch).item(), thing.python.random(),
            thing.numpy.random(), thing.old_numpy.rand(),
        )  # fmt: skip

    objects = dict(vars(thing))
    first = draws()
    for _ in range(2):  # a snapshot can be put back again
        thing.list[1].append(3), thing.list.append(4), thing.deque.append(9), thing.set.clear()
        thing.dict["b"]["c"], thing.dict["d"], thing.number = 5, 6, 8
        thing.ordered.move_to_end("x"), thing.tuple[0].clear(), thing.tensor.fill_(1), thing.array.fill(1)
        thing.inner, thing.new, inner.more = None, 1, 2
        snapshot.restore()
        assert all(vars(thing)[name] is value for name, value in objects.items())
        assert thing.list == [1, [2]]
        assert list(thing.deque) == [1, 2]
        assert thing.set == {1, 2}
        assert thing.dict == {"a": 1, "b": {"c": 2}}
        assert list(thing.ordered) == ["x", "y"]
        assert thing.tuple == ([7],)
        assert not hasattr(thing, "new")
        assert not hasattr(inner, "more")
        assert (
            thing.tensor.view(torch.int32).tolist()
            == torch.tensor([0.0, -0.0, float("nan")]).view(torch.int32).tolist()
        )
        assert thing.array.tolist() == [0, 1, 2]
        assert draws() == first


def test_a_snapshot_keeps_gradients_flags_modes_and_hooks_of_a_module():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    model[0].weight.grad = torch.ones(2, 2)
    model[2].eval()
    gradient, weight = model[0].weight.grad, model[0].weight.detach().clone()
    snapshot = Snapshot(model)
    model[0].weight.grad = None
    gradient.fill_(3)
    model[0].bias.grad = torch.ones(2)
    model[0].bias.requires_grad_(False)
    model[0].register_forward_hook(lambda *_: None)
    model(torch.randn(4, 2))
    model.train()
    model[0].weight.data = torch.zeros(5)  # another tensor altogether
    snapshot.restore()
    assert model[0].weight.grad is gradient
    assert gradient.eq(1).all()
    assert model[0].bias.grad is None
    assert model[0].bias.requires_grad
    assert not model[0]._forward_hooks
    assert model[1].num_batches_tracked == 0
    assert not model[2].training
    assert torch.equal(model[0].weight, weight)


def test_light_tensors_are_not_copied_and_what_cannot_be_written_is_left():
    weight, wide = nn.Parameter(torch.zeros(2)), torch.zeros(1).expand(4)
    with torch.inference_mode():
        frozen = torch.zeros(2)
    snapshot = Snapshot([weight, wide, frozen], light=[weight])
    with torch.no_grad():
        weight.fill_(1)
    weight.grad = torch.ones(2)
    snapshot.restore()
    assert weight.eq(1).all()
    assert weight.grad is None


class Hits(nn.Module):
    """A metric and a counter, as users keep them in a module."""

    def __init__(self):
        super().__init__()
        self.total, self.seen, self.calls = torch.zeros(()), [], 0

    def forward(self, loss):
        self.total += loss.detach()
        self.seen.append(loss.detach())
        self.calls += 1


class Busy(TinyBlocks):
    """Has all that a step can move: a metric, batch statistics, dropout, logging."""

    def make(self, dropout, layers):
        super().make(0.1, layers)
        self.hits, self.statistics = Hits(), nn.BatchNorm1d(1)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch) + 0 * self.statistics(torch.randn(4, 1)).sum()
        self.hits(loss)
        self.log("loss", loss)
        return loss


class Remembers(eke.TechniqueCallback):
    """Keeps a tensor, a list, a count and random numbers, and changes batches."""

    technique = eke.Technique(
        name="remembers", kind="callback", effects=("changes batch content",), exactness="approximate"
    )

    def __init__(self):
        self.mean, self.seen, self.count = torch.zeros(()), [], 0

    def alter_batch(self, run, batch):
        self.count += 1
        x, y = batch
        return x.roll(int(torch.randint(3, (), generator=self.generator)), 0), y

    def around_step(self, run, call_next, batch, *args):
        loss = call_next(batch, *args)
        self.mean.mul_(0.9).add_(loss.detach())
        self.seen.append(float(loss))
        return loss

    def state_dict(self):
        return {"mean": self.mean.clone(), "seen": list(self.seen), "count": self.count}

    def load_state_dict(self, state):
        self.mean.copy_(state["mean"])
        self.seen[:], self.count = state["seen"], state["count"]


class Idle(eke.TechniqueCallback):
    technique = eke.Technique(name="idle", kind="callback")


class Tries(Callback):
    """Tries steps at the beginning and in mid-run."""

    def __init__(self, at=(0, 3), **options):
        self.at, self.options, self.found = at, options, []

    def on_train_start(self, trainer, pl_module):
        accumulate = trainer.accumulate_grad_batches
        batches = sample_batches(trainer, 2 * accumulate, on_device=False)
        self.windows = [batches[:accumulate], batches[accumulate:]]
        self.on_train_batch_start(trainer, pl_module, None, 0)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.at and batch_idx % trainer.accumulate_grad_batches == 0:
            self.at = [one for one in self.at if one != trainer.global_step]
            self.found.append(trial(trainer, self.windows, **self.options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"device": "cpu"},
        {"accumulate_grad_batches": 2, "steps": 8},
        {"precision": "bf16-mixed", "gradient_clip_val": 0.1},
        {"plugins": lambda: MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))},
    ],
    ids=lambda options: " ".join(options) or "plain",  # no address in a name: processes have to agree on it
)
def test_a_run_goes_on_to_the_bits_of_one_that_tried_nothing(options):
    options = dict(options)
    device, plugin = options.pop("device", None), options.pop("plugins", None)

    def run(*callbacks):
        plugins = [plugin()] if plugin else []
        return fit(Busy(), Remembers(), *plugins, loader=shuffled, callbacks=callbacks, **options)

    tries = Tries(device=device)
    plain, tried = run(), run(tries)
    assert len(tries.found) == 2
    assert_same(plain.state, tried.state, "a run without a trial, then with two")
    assert tried.model.hits.calls == plain.model.hits.calls
    assert torch.equal(tried.model.hits.total, plain.model.hits.total)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_trial_takes_the_steps_that_the_run_would_take(accumulate):
    """Its losses are those of the run's first steps, whose batches it was given."""

    class Losses(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            with torch.no_grad():
                self.seen.append(float(outputs["loss"]))

    losses, tries = Losses(), Tries(at=(0,), warmup=0)

    class Flat(TinyBlocks):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    options = {"accumulate_grad_batches": 2, "steps": 8} if accumulate == 2 else {"gradient_clip_val": 0.5}
    fit(Flat(), Idle(), loader=shuffled, callbacks=[tries, losses], **options)
    (found,) = tries.found
    steps = [sum(losses.seen[i : i + accumulate]) for i in (0, accumulate)]  # Lightning has divided them
    assert found.losses == pytest.approx(steps, rel=1e-6)
    assert len(found.seconds) == 2
    parameters = sum(one.nbytes for one in Flat().parameters())
    assert found.memory["parameters"] == parameters
    assert parameters <= found.memory["optimizer"] < 1.1 * parameters  # momentum, which the run has only later


def test_a_trial_logs_nothing():
    def logged(*callbacks):
        seen = []

        class Logs(Busy):
            def log(self, name, value, **options):
                seen.append(name)

        fit(Logs(), Remembers(), loader=shuffled, callbacks=callbacks)
        return seen

    assert logged(Tries()) == logged()


def test_two_processes_try_together_and_go_on_together():
    def one(rank, *callbacks):
        done = fit(Busy(), Remembers(), world=2, callbacks=callbacks)
        return done.state["weights"], done.state["random"]

    plain = run_ranks(lambda rank: one(rank))
    tried = run_ranks(lambda rank: one(rank, Tries()))
    assert_same(plain, tried, "two processes without a trial, then with two")


def test_a_trial_that_fails_leaves_nothing_behind():
    class Fails(Callback):
        def on_train_start(self, trainer, pl_module):
            batches = sample_batches(trainer, 1, on_device=False)
            with pytest.raises(ZeroDivisionError):
                self.fail(trainer, batches)

        def fail(self, trainer, batches):
            with rolled_back(trainer):
                take_step(trainer, batches)
                raise ZeroDivisionError

    plain, failed = fit(Busy(), Remembers()), fit(Busy(), Remembers(), callbacks=[Fails()])
    assert_same(plain.state, failed.state, "a run without a trial, then with one that failed")


def test_a_compiled_model_is_timed_and_its_memory_is_not_counted():
    tries, model = Tries(at=(0,)), TinyBlocks()
    model.blocks[0].compile(backend="eager")
    fit(model, callbacks=[tries])
    assert tries.found[0].memory is None
    assert len(tries.found[0].seconds) == 1


def test_what_cannot_be_tried_is_refused_in_words():
    class ByHand(TinyBlocks):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            pass

    class Engine(SingleDeviceStrategy):
        handles_gradient_accumulation = True

    with pytest.raises(TrialError, match="ByHand optimizes by hand.*Let Lightning optimize"):
        fit(ByHand(), callbacks=[Tries()])
    with pytest.raises(TrialError, match="Engine runs backward and the optimizer in an engine of its own"):
        fit(TinyBlocks(), Engine("cpu"), callbacks=[Tries()])
    with pytest.raises(TrialError, match="2 steps, of which warmup=2 are not timed, leave none"):
        fit(TinyBlocks(), callbacks=[Tries(warmup=2)])


def test_things_are_measured_in_turns_and_the_order_turns_around():
    order = []
    rounds = interleave(lambda: order.append("on") or 2.0, lambda: order.append("off") or 1.0, 2)
    assert order == [*turns(0), *turns(1)] == ["on", "off", "off", "on", "off", "on", "on", "off"]
    assert rounds == [[2.0, 1.0, 1.0, 2.0], [1.0, 2.0, 2.0, 1.0]]
    assert compare(rounds) == {
        "measured": True, "rounds": 2, "step_ratio": [2.0, 2.0, 2.0], "control": [1.0, 1.0, 1.0], "told_apart": True,
    }  # fmt: skip


def test_a_drift_within_a_round_cancels():
    drifting = [[1.0, 2.2, 2.4, 1.3], [2.0, 1.1, 1.2, 2.6]]  # 1, 1.1, 1.2, 1.3 times as slow
    assert compare(drifting)["step_ratio"] == pytest.approx([0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("ratios", "control", "said"),
    [
        ([1.1, 1.2], [1.0, 1.05], True),
        ([1.1, 1.2], [1.0, 1.15], False),  # one lies within what two equal things differ by
        ([0.8, 0.9], [0.95], True),
        ([0.8, 1.2], [1.0], False),  # not on one side
        ([1.01, 1.015], [1.0], False),  # nearer than least
        ([1.1, 1.2], [0.85], False),  # the control's reach is the same on both sides
    ],
)
def test_a_difference_is_one_that_every_round_shows_beyond_the_control(ratios, control, said):
    assert differ(ratios, control) == said


def test_the_clock_of_a_cpu_is_the_plain_one():
    assert seam.clock(torch.device("cpu")) is seam.perf_counter


class Everywhere(eke.TechniqueCallback):
    """Says where it was called, and keeps a point of the run from ``check``, marks on the model, and a state."""

    technique = eke.Technique(name="everywhere", kind="callback", effects=("changes gradients",))
    point = eke.in_run(None)

    def __init__(self):
        self.calls, self.count = [], 0

    def check(self, run):
        self.point, self.count = run.until(0.5), 0

    def alter_model(self, run):
        run.module.marks = getattr(run.module, "marks", 0) + 1
        run.at_end(lambda: vars(run.module).update(marks=run.module.marks - 1))

    def alter_batch(self, run, batch):
        self.calls.append("batch")
        return batch

    def around_step(self, run, call_next, batch, *args):
        self.calls.append("step")
        self.count += 1
        assert self.point.done >= 0
        return call_next(batch, *args)

    def before_optimizer_step(self, run, optimizer):
        self.calls.append("gradients")

    def after_optimizer_step(self, run, optimizer):
        self.calls.append("weights")

    def on_train_batch_end(self, *args):
        self.calls.append("hook")

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_of_a_technique_that_is_switched_off_nothing_is_called_until_it_is_on_again():
    technique, seen = Everywhere(), []

    class Switches(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 1:
                switch_off(technique)
            if batch_idx == 3:
                switch_on(technique)
            technique.calls.clear()

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append((sorted(technique.calls), module.marks, technique.count))

    fit(TinyBlocks(), technique, callbacks=[Switches()], epochs=1)
    every = ["gradients", "hook", "step", "weights"]  # its batch was changed before it was switched
    assert [calls for calls, _, _ in seen] == [every, [], [], every]
    assert [marks for _, marks, _ in seen] == [1, 0, 0, 1]
    assert (seen[0][2], seen[3][2]) == (1, 2)

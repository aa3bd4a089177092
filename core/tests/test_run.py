"""The run as a technique sees it, and the methods that it is given to."""

import copy
import pickle
from contextlib import nullcontext

import eke
import pytest
import torch
from eke import in_run
from eke.testing import TinyBlocks, fit
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

SILENT = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.layer(batch)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data():
    return DataLoader(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), batch_size=2)


def trainer(*callbacks, **options):
    return Trainer(**{"max_epochs": 1, "accelerator": "cpu", **SILENT, **options, "callbacks": list(callbacks)})


class Technique(eke.TechniqueCallback):
    technique = eke.Technique(name="one", kind="callback", effects=("changes weights", "changes loss"))


class Zeros(Technique):
    """An initialization: the layer begins at 3."""

    begun = 0

    def initialize(self, run):
        self.begun += 1
        nn.init.constant_(run.module.layer.weight, 3.0)


def test_an_initialization_runs_once_for_fresh_weights_and_never_again(tmp_path):
    technique, model = Zeros(), Net()
    run = trainer(technique)
    run.fit(model, data())
    trained = model.layer.weight.clone()
    assert not torch.equal(trained, torch.full_like(trained, 3.0))
    run.save_checkpoint(tmp_path / "a.ckpt")
    run.validate(model, data(), verbose=False)
    run.test(model, data(), verbose=False)
    assert torch.equal(model.layer.weight, trained)
    run.fit_loop.max_epochs = 2
    run.fit(model, data())
    trainer(technique, max_epochs=3).fit(model, data())  # another Trainer, weights that are trained
    assert technique.begun == 1
    again = Zeros()
    trainer(again, max_epochs=2).fit(Net(), data(), ckpt_path=tmp_path / "a.ckpt")
    assert again.begun == 0


def test_an_initialization_comes_after_every_change_of_the_model():
    class Widens(eke.TechniqueCallback):
        technique = eke.Technique(name="zzz", kind="callback", effects=("changes module tree",))

        def alter_model(self, run):
            run.module.layer = nn.Linear(4, 5)

    model = Net()
    seen = []

    class Fills(Zeros):
        def initialize(self, run):
            super().initialize(run)
            seen.append(tuple(run.module.layer.weight.shape))

    trainer(Fills(), Widens(), max_epochs=0).fit(model, data())
    assert seen == [(5, 4)]


def test_a_run_is_there_while_it_is_open_and_gone_afterwards():
    seen = []

    class Looks(Technique):
        def on_train_start(self, trainer, pl_module):
            run = self.run
            seen.append(
                (run.name, run.fitting, run.rank, run.world_size, run.trainer is trainer, run.module is pl_module)
            )

    technique = Looks()
    run = trainer(technique)
    run.fit(Net(), data())
    assert seen == [("one", True, 0, 1, True, True)]
    with pytest.raises(eke.EkeError, match="Looks is in no run: ask for one inside of Trainer.fit"):
        technique.run  # noqa: B018


def test_a_copy_of_a_technique_in_a_run_is_in_none():
    class Copies(Technique):
        def alter_model(self, run):
            self.mine, self.blocks = run, run.blocks("blocks")

        def on_train_start(self, trainer, pl_module):
            self.copies = copy.deepcopy(self), pickle.loads(pickle.dumps(self))

    globals()["Copies"] = Copies
    Copies.__qualname__ = "Copies"
    technique = Copies()
    fit(TinyBlocks(), technique, epochs=1)
    for twin in technique.copies:
        assert twin._run is None
        assert twin.mine is None
        assert twin.blocks is None


@pytest.mark.parametrize("fails", [False, True])
def test_what_belongs_to_the_run_begins_anew_in_each_is_in_no_copy_and_is_forgotten_at_the_end(fails):
    class Finds(Technique):
        _blocks: list = in_run(list)
        _seen: int = in_run(0)

        def alter_model(self, run):
            assert (self._blocks, self._seen) == ([], 0)
            self._blocks.append(run.module)
            self._seen = 1

        def on_train_start(self, trainer, pl_module):
            self.copies = copy.deepcopy(self), pickle.loads(pickle.dumps(self))
            self.kept = self._blocks
            if fails:
                raise RuntimeError("a failing run")

        def end_run(self, run):
            assert self._blocks == [run.module]  # until all is undone

    globals()["Finds"] = Finds
    Finds.__qualname__ = "Finds"
    technique, other = Finds(), Finds()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a failing run") if fails else nullcontext():
            fit(TinyBlocks(), technique, epochs=1)
        assert len(technique.kept) == 1
        for one in (technique, other, *technique.copies):
            assert one._blocks == []
            assert one._seen == 0
    assert technique._blocks is not other._blocks


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_noted_for_the_end_is_undone_last_come_first_also_after_an_exception(fails):
    undone = []

    class Notes(Technique):
        def alter_model(self, run):
            run.at_end(lambda: undone.append("first"))
            run.at_end(lambda: undone.append("second"))

        def on_train_batch_start(self, *_):
            if fails:
                raise RuntimeError("broken")

        def end_run(self, run):
            undone.append("end")

    run = trainer(Notes())
    if fails:
        with pytest.raises(RuntimeError, match="broken"):
            run.fit(Net(), data())
    else:
        run.fit(Net(), data())
    assert undone == ["end", "second", "first"]


def test_a_technique_that_refuses_leaves_no_run_behind():
    class Refuses(Technique):
        def check(self, run):
            raise eke.EkeError("no")

    technique = Refuses()
    with pytest.raises(eke.EkeError, match="no"):
        trainer(technique).fit(Net(), data())
    assert technique._run is None


def test_seeds_are_drawn_alike_everywhere_and_apart_by_rank():
    one, other = Technique(), Technique()
    first, second = eke.Run(one, None, Net()), eke.Run(other, None, Net())
    assert [first.seed(), first.seed(per_rank=True)] == [second.seed(), second.seed(per_rank=True)]
    assert first.seed() != first.seed()


@pytest.mark.parametrize("returns", ["tensor", "dict"])
def test_a_loss_term_is_added_to_whatever_a_step_returns(returns):
    class Dicts(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if returns == "tensor" else {"loss": loss, "more": 1}

    class Decays(Technique):
        def around_step(self, run, call_next, batch, *args):
            output = call_next(batch, *args)
            run.add_loss(0.5 * run.module.layer.weight.square().sum())
            return output

    class ByHand(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0.5 * self.layer.weight.square().sum()

    got, wanted = Dicts(), ByHand()
    trainer(Decays(), accumulate_grad_batches=2).fit(got, data())
    trainer(accumulate_grad_batches=2).fit(wanted, data())
    torch.testing.assert_close(got.state_dict(), wanted.state_dict())


def test_a_loss_term_outside_of_a_step_is_none_and_a_vector_is_refused():
    class Hooks(Technique):
        def alter_model(self, run):
            hook = run.module.layer.register_forward_hook(lambda *_: run.add_loss(self.term(run)))
            run.at_end(hook.remove)

        def term(self, run):
            return run.module.layer.bias.sum()

    class Vector(Hooks):
        def term(self, run):
            return run.module.layer.weight[0]

    trainer(Hooks()).fit(Net(), data(), data())  # validation calls the hook too
    with pytest.raises(eke.EkeError, match=r"one adds a loss of shape \(4,\): a scalar is needed"):
        trainer(Vector()).fit(Net(), data())


def test_a_loss_term_that_the_record_does_not_declare_is_refused():
    class Silent(Technique):
        technique = eke.Technique(name="silent", kind="callback")

        def around_step(self, run, call_next, batch, *args):
            run.add_loss(run.module.layer.bias.sum())
            return call_next(batch, *args)

    with pytest.raises(eke.EkeError, match="silent adds to the loss, which its record does not say"):
        trainer(Silent()).fit(Net(), data())


def test_after_each_step_of_the_optimizer_and_only_then():
    class Counts(Technique):
        def __init__(self):
            self.steps, self.weights = [], []

        def after_optimizer_step(self, run, optimizer):
            self.steps.append(run.progress.micro_steps)
            self.weights.append(run.module.layer.weight.clone())

    technique, model = Counts(), Net()
    trainer(technique, accumulate_grad_batches=2).fit(model, data())
    assert technique.steps == [1, 3]  # within the batch that ends a window
    assert torch.equal(technique.weights[-1], model.layer.weight)

    class ByHand(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()

    technique = Counts()
    trainer(technique).fit(ByHand(), data())
    assert len(technique.steps) == 4

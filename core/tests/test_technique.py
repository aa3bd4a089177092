"""The coordinator: order, refusals, undoing, step cost."""

import itertools

import eke
import pytest
import torch
from eke import measure
from eke.technique import Coordinator
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.validated_with = self.layer.weight.clone()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(batches=4):
    return DataLoader(torch.randn(2 * batches, 4, generator=torch.Generator().manual_seed(1)), batch_size=2)


def trainer(*callbacks, **options):
    silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return Trainer(**{"max_epochs": 1, "accelerator": "cpu", **silent, **options, "callbacks": list(callbacks)})


def technique(technique_name, *effects, base=eke.TechniqueCallback, **record):
    """A class of technique with these effects."""
    fields = {"technique": eke.Technique(name=technique_name, kind="callback", effects=effects, **record)}
    return type(technique_name.title(), (base,), fields)


class Writes(eke.TechniqueCallback):
    """Notes each of its seams in a list that all techniques of a test share."""

    def __init__(self, notes):
        self.notes = notes

    def note(self, what):
        self.notes.append((self.technique.name, what))

    def alter_model(self, run):
        self.note("model")

    def alter_optimizer(self, run, optimizer):
        self.note("optimizer")
        return optimizer

    def alter_loader(self, run, loader):
        self.note("loader")
        return loader

    def alter_batch(self, run, batch):
        self.note("batch")
        return batch

    def around_step(self, run, call_next, batch, *args):
        self.note("step")
        return call_next(batch, *args)

    def on_train_batch_end(self, *_):
        self.note("hook")


def test_the_order_is_that_of_the_effects_in_whatever_order_they_are_listed():
    kinds = [
        technique("reads_loss", "reads loss", base=Writes),
        technique("changes_loss", "changes loss", base=Writes),
        technique("replaces_loss", "replaces loss", base=Writes),
    ]
    for listed in itertools.permutations(kinds):
        notes = []
        trainer(*(kind(notes) for kind in listed), limit_train_batches=1).fit(Net(), data())
        for seam in ("model", "optimizer", "loader", "batch", "step", "hook"):
            assert [name for name, what in notes if what == seam] == ["replaces_loss", "changes_loss", "reads_loss"]


def test_hand_listed_techniques_get_the_refusal_that_the_registry_gives():
    first, second = technique("first", "replaces optimizer"), technique("second", "replaces optimizer")
    for listed in ([first(), second()], [second(), first()]):
        with pytest.raises(eke.ConflictError, match="'first' and 'second' both replace the optimizer"):
            trainer(*listed).fit(Net(), data())


def test_a_technique_given_twice_is_refused():
    one = technique("one", "changes loss")
    with pytest.raises(eke.ConflictError, match="'one' is given twice"):
        trainer(one(), one()).fit(Net(), data())


def test_a_strategy_of_ours_takes_part_in_the_refusals():
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class Sharding(SingleDeviceStrategy):
        technique = eke.Technique(name="sharding", kind="strategy", conflicts={"one": "it cannot see shards."})

    with pytest.raises(eke.ConflictError, match="'sharding' cannot run together with 'one': it cannot see shards"):
        trainer(technique("one", "changes loss")(), strategy=Sharding(device="cpu")).fit(Net(), data())


def test_a_module_that_optimizes_by_hand_is_refused_where_the_record_asks_for_lightning_to():
    model = Net()
    model.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="One .*by hand.*Leave the technique out"):
        trainer(technique("one", needs=("automatic optimization",))()).fit(model, data())


class Everything(Writes):
    technique = eke.Technique(name="everything", kind="callback", effects=("changes loss",))


def left_by_lightning():
    """Attributes that a run without techniques leaves on a module."""
    model = Net()
    trainer().fit(model, data())
    return set(vars(model)) | {"validated_with"}


def test_nothing_of_a_run_stays_on_the_users_objects():
    model, loader, run = Net(), data(), trainer(Everything([]))
    run.fit(model, loader)
    assert set(vars(model)) <= left_by_lightning()
    assert type(loader) is DataLoader
    assert "process_dataloader" not in vars(run.strategy)


def test_nothing_stays_after_an_exception_and_a_second_fit_works():
    class Fails(Net):
        fail = True

        def training_step(self, batch, batch_idx):
            if self.fail:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    model, loader, notes = Fails(), data(), []
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer(Everything(notes)).fit(model, loader)
    assert set(vars(model)) - {"fail"} <= left_by_lightning()
    assert type(loader) is DataLoader
    model.fail = False
    trainer(Everything(notes)).fit(model, loader)
    assert ("everything", "hook") in notes


def test_what_a_refusing_technique_had_wrapped_before_is_unwrapped():
    class Refuses(technique("refuses", "reads loss")):
        def check(self, run):
            raise MisconfigurationException("not here")

    model = Net()
    with pytest.raises(MisconfigurationException, match="not here"):
        trainer(Everything([]), Refuses()).fit(model, data())
    assert "training_step" not in vars(model)


def test_techniques_leave_the_callback_list_and_can_be_asked_for(tmp_path):
    one, two, checkpoint = technique("one")(), technique("two")(), ModelCheckpoint(tmp_path)
    run = trainer(two, one, checkpoint, enable_checkpointing=True)
    run.fit(Net(), data())
    assert [type(callback) for callback in run.callbacks] == [Coordinator, ModelCheckpoint]
    assert eke.techniques(run) == [one, two]


def test_a_run_without_techniques_may_be_asked_for_them_in_its_middle():
    class Asks(Callback):
        def on_train_batch_start(self, trainer, *_):
            self.found = eke.techniques(trainer)

    asks = Asks()
    trainer(asks).fit(Net(), data())
    assert asks.found == []


def test_a_technique_added_before_a_second_fit_joins():
    notes = []
    run = trainer(technique("one")())
    run.fit(Net(), data())
    run.callbacks.append(Everything(notes))
    run.fit_loop.max_epochs = 2
    run.fit(Net(), data())
    assert [kind.technique.name for kind in eke.techniques(run)] == ["everything", "one"]
    assert ("everything", "step") in notes


def test_checkpoints_hold_only_what_a_safe_load_reads():
    class Odd(technique("odd")):
        def state_dict(self):
            return {"range": [{1, 2}]}

    run = trainer(Odd())
    run.fit(Net(), data())
    with pytest.raises(TypeError, match=r"state of odd\['state'\]\['range'\]\[0\] is a set"):
        run.save_checkpoint("never.ckpt")


def test_a_missing_technique_is_named_at_resume(tmp_path):
    run = trainer(technique("one")(), technique("two", exactness="approximate")())
    run.fit(Net(), data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(eke.ConflictError, match="written with 'two', which this Trainer does not have"):
        trainer(technique("one")(), max_epochs=2).fit(Net(), data(), ckpt_path=tmp_path / "a.ckpt")
    trainer(max_epochs=2).fit(Net(), data(), ckpt_path=tmp_path / "a.ckpt")  # without Eke it is an ordinary file


def test_state_of_a_later_version_is_refused(tmp_path):
    newer, older = technique("one"), technique("one")
    newer.version = 2
    run = trainer(newer())
    run.fit(Net(), data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(eke.ConflictError, match="'one' state of version 2, and the installed one reads up to 1"):
        trainer(older(), max_epochs=2).fit(Net(), data(), ckpt_path=tmp_path / "a.ckpt")


class Averages(eke.TechniqueCallback):
    technique = eke.Technique(name="averages", kind="callback", effects=("replaces weights-at-eval",))

    def eval_weights(self):
        return {"layer.weight": torch.full((1, 4), 3.0)}


def test_validation_and_saved_files_see_the_weights_for_evaluation(tmp_path):
    model, run = Net(), trainer(Averages(), max_epochs=1)
    run.fit(model, data(), data())
    assert model.validated_with.eq(3).all()
    assert not model.layer.weight.eq(3).any()
    trained = model.layer.weight.clone()
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt")["state_dict"]["layer.weight"].eq(3).all()
    assert torch.equal(model.layer.weight, trained)


def test_a_resumed_run_goes_on_from_the_training_weights(tmp_path):
    whole = Net()
    trainer(Averages(), max_epochs=2).fit(whole, data(), data())
    half = trainer(Averages(), max_epochs=1)
    half.fit(Net(), data(), data())
    half.save_checkpoint(tmp_path / "a.ckpt")
    rest = Net()
    trainer(Averages(), max_epochs=2).fit(rest, data(), data(), ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(rest.layer.weight, whole.layer.weight)


def test_a_run_that_fails_in_validation_gets_its_training_weights_back():
    class Fails(Net):
        def validation_step(self, batch, batch_idx):
            raise RuntimeError("on purpose")

    model = Fails()
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer(Averages(), num_sanity_val_steps=0).fit(model, data(), data())
    assert not model.layer.weight.eq(3).any()


def calls_per_step(*callbacks):
    """Python calls of one training step: the difference between a run of 30 steps and one of 20, over ten."""
    counts = []
    for steps in (10, 20, 30):  # the first warms caches up
        run = trainer(*(callback() for callback in callbacks))
        with measure.python_calls() as counted:
            run.fit(Net(), data(steps))
        counts.append(counted["calls"])
    return (counts[2] - counts[1]) / 10


def test_ten_techniques_cost_what_one_callback_costs():
    lean = calls_per_step()
    one_callback = calls_per_step(Callback) - lean
    ten_callbacks = calls_per_step(*[Callback] * 10) - lean
    one_technique = calls_per_step(technique("t0")) - lean
    ten_techniques = calls_per_step(*(technique(f"t{i}") for i in range(10))) - lean
    assert ten_callbacks == 10 * one_callback
    # Beside the callback: noting where the run stands, whatever the techniques, and the random state of each.
    assert one_technique <= one_callback + 50, (lean, one_callback, one_technique)
    assert ten_techniques <= one_technique + 9, (lean, one_technique, ten_techniques)


def test_a_technique_with_one_hook_adds_one_call():
    class Hooked(technique("hooked")):
        def on_train_batch_end(self, *_):
            pass

    assert calls_per_step(Hooked) == calls_per_step(technique("bare")) + 1


def test_techniques_without_a_step_add_no_operators():
    def operators_per_step(*callbacks):
        counts = []
        for steps in (10, 20):
            run = trainer(*callbacks)
            with measure.OperatorCounter() as counted:
                run.fit(Net(), data(steps))
            counts.append(counted.total)
        return (counts[1] - counts[0]) / 10

    assert operators_per_step(technique("one")(), technique("two")()) == operators_per_step()


def test_reading_the_clock_outside_a_run_gives_its_beginning():
    assert technique("one")().progress.steps == 0


def test_a_technique_alters_the_model_on_the_cpu_wherever_lightning_makes_tensors():
    class Elsewhere(SingleDeviceStrategy):
        def tensor_init_context(self, empty_init=None):
            return torch.device("meta")  # as the GPU's is the GPU

    class Adds(technique("adds", "changes module tree")):
        def alter_model(self, run):
            self.made = torch.rand(2, generator=self.generator).device, nn.Linear(4, 4).weight.device

    adds = Adds()
    trainer(adds, strategy=Elsewhere("cpu"), accelerator="auto").fit(Net(), data())
    assert adds.made == (torch.device("cpu"), torch.device("cpu"))

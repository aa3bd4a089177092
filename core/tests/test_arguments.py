"""Other arguments or other techniques at a resume, and files that do not fit: what a user reads, and what goes on."""

import dataclasses
import functools
import os
import warnings
from pathlib import Path

import eke
import pytest
import torch
from eke.coordinator import arguments
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[:, 0].tolist())
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def record(name, exactness="approximate", effects=("changes gradients",)):
    return eke.Technique(name=name, kind="callback", effects=effects, exactness=exactness)


class Shrink(eke.TechniqueCallback):
    """Keeps nothing under the names of its arguments."""

    technique = record("shrink")
    may_change = ("loud",)
    must_not_change = ("parts",)

    def __init__(self, factor=0.5, *, parts=2, file: str | Path = "a.txt", loud=False, how=None):
        self._factor = factor


class Other(eke.TechniqueCallback):
    technique = record("other")


class Observer(eke.TechniqueCallback):
    technique = record("observer", "exact", ())

    def __init__(self, every=1):
        self.every = every


def train(*techniques, ckpt=None, steps=3, batches=8):
    silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    run = Trainer(accelerator="cpu", max_steps=steps, callbacks=list(techniques), **silent)
    data = torch.arange(8.0 * batches).reshape(2 * batches, 4) / 99
    run.fit(Net(), DataLoader(data, batch_size=2), ckpt_path=ckpt)
    return run


class Save(Callback):
    """In mid-run, where the loaders are being read."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)


def file(folder, *techniques, **options):
    path = Path(folder, "a.ckpt")
    train(*techniques, Save(path), **options)
    return path


def told(*techniques, ckpt, **options):
    """What a resumed run says of the core's."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert train(*techniques, ckpt=ckpt, steps=5, **options).global_step == 5
    return " ".join(str(one.message) for one in caught if str(one.message).startswith("Eke:"))


def willing(technique):
    technique.on_changed_arguments = "warn"
    return technique


def test_a_changed_argument_is_refused_with_what_it_was_and_goes_on_by_the_users_word(tmp_path):
    ckpt = file(tmp_path, Shrink(0.5))
    words = r"written with Shrink\(factor=0.5\), and this run has Shrink\(factor=0.3\).*Give factor=0.5"
    with pytest.raises(eke.ResumeError, match=words + ".*on_changed_arguments = 'warn'"):
        train(Shrink(0.3), ckpt=ckpt)
    assert "Shrink(factor=0.3)" in told(willing(Shrink(0.3)), ckpt=ckpt)
    assert told(Shrink(factor=0.5), ckpt=ckpt) == ""
    technique = Shrink(0.3)
    technique.on_changed_arguments = "maybe"
    with pytest.raises(eke.EkeError, match="on_changed_arguments='maybe' of Shrink: give 'refuse' or 'warn'"):
        train(technique, ckpt=ckpt)


def test_what_may_change_and_what_names_a_place_changes_without_a_word(tmp_path):
    ckpt = file(tmp_path, Shrink(file="here.txt", loud=False))
    assert told(Shrink(file="/elsewhere/there.txt", loud=True), ckpt=ckpt) == ""


def test_what_must_not_change_is_refused_whatever_the_user_says(tmp_path):
    ckpt = file(tmp_path, Shrink())
    with pytest.raises(
        eke.ResumeError, match=r"Shrink\(parts=3\)\. Its state cannot be read on: give parts=2"
    ) as caught:
        train(willing(Shrink(parts=3)), ckpt=ckpt)
    assert "on_changed_arguments" not in str(caught.value)


def test_a_technique_left_out_or_added_is_named(tmp_path):
    ckpt = file(tmp_path, Shrink())
    with pytest.raises(
        eke.ResumeError, match="with 'shrink', which this Trainer does not have.*Add it.*without 'other'"
    ):
        train(Other(), ckpt=ckpt)
    assert "without 'other'" in told(willing(Other()), ckpt=ckpt)
    ckpt = file(tmp_path)
    with pytest.raises(eke.ResumeError, match="written without 'shrink'.*Leave it out, or begin a new run"):
        train(Shrink(), ckpt=ckpt)
    assert "without 'shrink'" in told(willing(Shrink()), ckpt=ckpt)


@pytest.mark.parametrize("effect", ["replaces optimizer", "changes module tree", "changes optimizer state"])
def test_what_shapes_states_can_be_neither_added_nor_left_out(tmp_path, effect):
    class Shaping(eke.TechniqueCallback):
        technique = record("shaping", effects=(effect,))

    with pytest.raises(eke.ResumeError, match="without 'shaping'.*was not there"):
        train(willing(Shaping()), ckpt=file(tmp_path))
    with pytest.raises(eke.ResumeError, match="with 'shaping'.*cannot be read on without it"):
        train(willing(Other()), ckpt=file(tmp_path, Shaping(), Other()))


def test_an_exact_technique_comes_goes_and_changes_with_a_warning(tmp_path):
    exact = "By its record the numbers stay"
    assert f"without 'observer', which this Trainer has. {exact}" in told(Observer(), ckpt=file(tmp_path))
    ckpt = file(tmp_path, Observer(), Other())
    assert f"with 'observer', which this Trainer does not have. {exact}" in told(Other(), ckpt=ckpt)
    assert f"this run has Observer(every=2). {exact}" in told(Observer(2), Other(), ckpt=ckpt)


def test_without_any_technique_lightning_says_what_the_file_was_written_with_and_trains_on(tmp_path):
    ckpt = file(tmp_path, Shrink(), Observer())  # in mid-epoch
    with pytest.warns(UserWarning, match=r"Please add the following callbacks: \['[\w.]*Shrink \(of Eke\)'\]"):
        assert train(ckpt=ckpt, steps=5).global_step == 5
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Be aware that when using")
        resumed = train(Shrink(), Observer(), ckpt=ckpt, steps=5)  # no false alarm
    assert resumed.lightning_module.seen == train(Shrink(), Observer(), steps=5).lightning_module.seen[3:]


@pytest.mark.parametrize(("damage", "words"), [
    (lambda own: {}, r"not whole: it has no version, progress, techniques"),
    (lambda own: None, r"not whole: it has no version"),
    (lambda own: {**own, "version": 99}, "version 99 of Eke's part, and the installed eke reads up to"),
    (lambda own: {**own, "techniques": {"shrink": {}}}, r"no techniques\['shrink'\]\['version'\]"),
])  # fmt: skip
@pytest.mark.parametrize("with_it", [True, False])
def test_a_damaged_part_or_one_of_the_future_is_a_sentence(tmp_path, damage, words, with_it):
    ckpt = file(tmp_path, Shrink())
    content = torch.load(ckpt)
    torch.save({**content, "eke": damage(content["eke"])}, ckpt)
    if with_it:
        with pytest.raises(eke.ResumeError, match=words):
            train(Shrink(), ckpt=ckpt)
    else:
        train(ckpt=ckpt)  # to a Trainer without Eke it is nothing


@pytest.mark.parametrize("batches", [2, 4, 9])
def test_data_of_another_size_is_refused_in_the_middle_of_an_epoch_and_said_at_its_end(tmp_path, batches):
    ckpt = file(tmp_path, Shrink())
    with pytest.raises(eke.ResumeError, match=f"middle of an epoch of 16 samples, and the data has {2 * batches}"):
        train(Shrink(), ckpt=ckpt, batches=batches)
    ckpt = file(tmp_path, Shrink(), batches=3)
    assert f"written with 6 samples, and this run has {2 * batches}" in told(Shrink(), ckpt=ckpt, batches=batches)


def test_what_a_technique_cannot_read_names_the_technique(tmp_path):
    class Reads(Other):
        def state_dict(self):
            return {"old": 1}

        def load_state_dict(self, state):
            state["new"]

    with pytest.raises(eke.ResumeError, match="'other' cannot go on from what this checkpoint holds.*KeyError: 'new'"):
        train(Reads(), ckpt=file(tmp_path, Reads()))


def test_a_file_from_before_arguments_were_kept_resumes(tmp_path):
    ckpt = file(tmp_path, Shrink())
    content = torch.load(ckpt)
    del content["eke"]["techniques"]["shrink"]["arguments"]
    torch.save(content, ckpt)
    assert told(Shrink(0.3), ckpt=ckpt) == ""


def test_trainer_kwargs_takes_the_users_word(tmp_path):
    built = eke.trainer_kwargs(on_changed_arguments="warn", infobatch={})["callbacks"]
    assert [one.on_changed_arguments for one in built] == ["warn"]
    with pytest.raises(eke.EkeError, match="on_changed_arguments='never': give 'refuse' or 'warn'"):
        eke.trainer_kwargs(on_changed_arguments="never", infobatch={})


# What is compared


def square(x):
    return x


@dataclasses.dataclass
class Window:
    size: int = 4
    _held: object = None


class Plain:
    def __init__(self, size):
        self.size, self._cache = size, object()


SAME = [
    (1, 1.0), ((1, 2), [1, 2]), ({2, 1}, frozenset((1, 2))), (float("nan"), float("nan")), (square, square),
    (Window(4), Window(4, "held")), (Plain(3), Plain(3)), (Path("a"), Path("b")),
    (torch.device("cpu"), torch.device("cuda:1")), (torch.ones(3), torch.ones(3)), (nn.Linear(2, 2), nn.Linear(2, 2)),
    (functools.partial(square, x=2), functools.partial(square, x=2)), (torch.float32, torch.float32),
    (os.getcwd, os.getcwd),
]  # fmt: skip
OTHERS = [
    (1, 2), (None, 0), ((1, 2), [2, 1]), ("a", "b"), (square, record), (Window(4), Window(5)), (Plain(3), Plain(4)),
    (Plain(3), Window(3)), (torch.ones(3), torch.zeros(3)), (nn.Linear(2, 2), nn.Linear(2, 3)),
    (nn.Dropout(0.1), nn.Dropout(0.2)),
    (functools.partial(square, x=2), functools.partial(square, x=3)), (torch.float32, torch.bfloat16),
    ({"r": 2}, {"r": 4}), (list(range(999)), list(range(1, 1000))),
    ([Window(1), [Window(2)]], [Window(1), [Window(3)]]),
]  # fmt: skip


@pytest.mark.parametrize("pair", SAME, ids=[f"{n} {type(a).__name__}" for n, (a, _) in enumerate(SAME)])
def test_what_says_the_same_is_the_same(pair):
    assert arguments.same(*map(arguments.describe, pair))


@pytest.mark.parametrize("pair", OTHERS, ids=[f"{n} {type(a).__name__}" for n, (a, _) in enumerate(OTHERS)])
def test_what_says_otherwise_is_told_apart(pair):
    assert not arguments.same(*map(arguments.describe, pair))


def test_a_description_is_plain_whatever_it_describes():
    endless = Plain(3)
    endless.me = [endless, {"me": endless}]
    content = arguments.describe([endless, lambda: 1, object(), iter(()), torch.Generator(), {1: {2: b"3"}}])
    eke.seams.state.check_plain(content, "description")
    assert arguments.same(
        content, arguments.describe([endless, lambda: 1, object(), iter(()), torch.Generator(), {1: {2: b"3"}}])
    )


def test_of_a_long_argument_the_entry_that_differs_is_shown():
    before = {"r": 2, **{f"key{i}": i for i in range(50)}}
    assert arguments.written("settings", before, {**before, "r": 4}) == ("settings['r']=2", "settings['r']=4")


def test_arguments_are_those_of_the_constructor_however_it_keeps_them():
    class Keeps(Shrink):
        technique = record("keeps")

        def __init__(self, share=None, **rest):
            super().__init__(**rest)
            self.share = 0.25 if share is None else share

    given = arguments.of(Keeps(factor=0.1))
    assert given == {"share": 0.25, "factor": 0.1}  # what it made of None, and what it handed on
    assert not arguments.changed(Keeps(0.25, factor=0.1), given)
    assert arguments.changed(Keeps(factor=0.2), given) == {"factor": (0.1, 0.2)}
    assert arguments.changed(Keeps(), given) == {"factor": (0.1, None)}
    assert not arguments.changed(Keeps(), {"share": 0.25})  # the rest was not given then either

    @dataclasses.dataclass
    class Written(eke.TechniqueCallback):
        technique = record("written")
        share: float = 0.5

    assert arguments.of(Written(0.7)) == {"share": 0.7}


def test_an_argument_that_an_older_version_did_not_have_counts_by_its_default():
    given = arguments.of(Shrink())
    del given["parts"]
    assert not arguments.changed(Shrink(), {**given, "gone": 1})
    assert arguments.changed(Shrink(parts=3), given) == {"parts": (2, 3)}

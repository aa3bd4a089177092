"""The promises of a technique, each a function that raises an AssertionError naming what was broken.

The contract calls them with defaults; call one directly to check a technique that is no subject of the contract.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from eke import EkeError, Technique, registry
from eke.testing import count, run
from eke.testing.compare import assert_same, class_attributes, copied, differences, footprint
from eke.testing.data import BATCH
from eke.testing.models import STEPS, TinyBlocks, TinyModel, tensors
from eke.testing.ranks import run_alone, run_ranks
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule

REFUSALS = (MisconfigurationException, ValueError, EkeError)


@dataclass(frozen=True)
class Subject:
    """What is checked, and on what.

    Args:
        build: Makes a new technique object.
        model: The kit's model that it is checked on.
        epochs: Epochs of a run.
        steps: Batches in an epoch.
        frozen: Patterns of names of weights that are meant to stay as they are, such as ``"embed.*"``.
        tolerance: Largest absolute difference of a weight where sums may be taken in another order.
        idle: Makes a technique that has nothing to do in a run, where one can be made.
        arguments: Arguments by which a LightningCLI builds it.
        extra_calls: Python calls that it may add to a step in which it has nothing to do.
        options: Trainer arguments of every run.
    """

    build: Callable[[], object]
    model: type[TinyModel] = TinyBlocks
    epochs: int = run.EPOCHS
    steps: int = STEPS
    frozen: tuple[str, ...] = ()
    tolerance: float = 1e-5
    idle: Callable[[], object] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    extra_calls: int = 20
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def record(self) -> Technique | None:
        """The technique's own record, or None for a callback that has none."""
        record = getattr(self.build(), "technique", None)
        return record if isinstance(record, Technique) else None

    def fit(self, model: LightningModule, *techniques: object, **options: Any) -> run.Run:
        return run.fit(model, *techniques, **{"epochs": self.epochs, "steps": self.steps, **self.options, **options})

    @property
    def chooses_samples(self) -> bool:
        """Whether its epochs may have fewer batches than the loader has."""
        record = self.record
        return record is not None and "samples" in record.touches("replaces")

    def touches(self, *resources: str) -> bool:
        """Whether the record says that it replaces or changes one of these. True where there is no record."""
        record = self.record
        return record is None or bool((record.touches("replaces") | record.touches("changes")) & set(resources))


# Training


def trains(subject: Subject, **options: Any) -> run.Run:
    """Every weight that is not declared frozen moves, and everything stays finite."""
    model = subject.model()
    before = copied(dict(model.named_parameters()))
    done = subject.fit(model, subject.build(), **options)
    after = done.state["weights"]
    broken = [name for name, weight in after.items() if weight.is_floating_point() and not weight.isfinite().all()]
    assert not broken, f"not finite after training: {_some(broken)}"
    stuck = [name for name, weight in before.items() if name in after and _equal(weight, after[name])]
    stuck = [name for name in stuck if not any(fnmatch(name, pattern) for pattern in subject.frozen)]
    assert not stuck, f"did not move in training and are not declared in frozen: {_some(stuck)}"
    lost = [name for name in before if name not in after]
    assert not lost or subject.touches("module tree"), f"gone after training, undeclared: {_some(lost)}"
    _finite_losses(done.state)
    return done


def loss_falls(subject: Subject) -> None:
    """The mean loss of the last epoch is below that of the first."""
    steps = subject.fit(subject.model(), subject.build()).state["steps"]
    losses = [step["loss"] for step in steps.values()]
    first, last = sum(losses[: subject.steps]), sum(losses[-subject.steps :])
    assert last < first, f"mean loss went from {first / subject.steps:.4f} to {last / subject.steps:.4f}"


def trains_or_refuses(subject: Subject, may_refuse: bool) -> str | None:
    """It trains this model, or refuses it before the first step with words. Returns the words of a refusal."""
    watch = _FirstStep()
    try:
        trains(subject, callbacks=[watch])
    except REFUSALS as error:
        refusal = str(error)
    else:
        return None
    assert may_refuse, f"{subject.model.__name__} is declared in shapes and was refused: {refusal}"
    assert not watch.stepped, f"refused only after the first step: {refusal}"
    assert len(refusal) >= 20, f"a refusal has to say why; it said {refusal!r}"
    return refusal


def trains_in_bf16(subject: Subject) -> None:
    """It trains with ``precision="bf16-mixed"``."""
    trains(subject, precision="bf16-mixed")


def clips_gradients(subject: Subject, limit: float = 1e-2) -> None:
    """With gradient clipping, the gradient that the optimizer saw is no longer than the limit."""
    state = subject.fit(subject.model(), subject.build(), gradient_clip_val=limit).state
    norms = {name: step["gradient norm"] for name, step in state["steps"].items()}
    long = [f"{name}: {norm:.4g}" for name, norm in norms.items() if norm is not None and norm > limit * 1.001]
    assert not long, f"gradients longer than gradient_clip_val={limit}: {_some(long)}"
    assert any(norms.values()), "no gradient was left to look at after any step"
    _finite_losses(state)


def accumulation_equals_the_big_batch(subject: Subject) -> None:
    """Two accumulated batches move the weights as one batch of twice the size does."""
    small = subject.fit(subject.model(), subject.build(), steps=2 * subject.steps, accumulate_grad_batches=2)
    large = subject.fit(subject.model(), subject.build(), batch=2 * BATCH)
    rates = [_rates(done.state) for done in (small, large)]
    assert_same(*rates, "learning rates under accumulation, then with the big batch")
    weights = [done.state["weights"] for done in (small, large)]
    assert_same(*weights, "weights under accumulation, then with the big batch", subject.tolerance)


def compiles(subject: Subject) -> None:
    """Under torch.compile it trains to the weights that it reaches without."""

    def weights(backend: str | None) -> dict[str, Any]:
        model = subject.model()
        return subject.fit(torch.compile(model, backend=backend) if backend else model, subject.build()).state[
            "weights"
        ]

    plain, compiled = run_alone(lambda: weights(None)), run_alone(lambda: weights("aot_eager"))
    assert_same(plain, compiled, "weights without torch.compile, then with it", subject.tolerance)


def ranks_equal_one_process(subject: Subject) -> None:
    """Two gloo processes under DDP end in the same state as each other, and near one process with twice the batch."""
    first = ranks_agree(subject)
    alone = run_alone(lambda: subject.fit(subject.model(), subject.build(), batch=2 * BATCH).state)
    assert_same(alone["weights"], first["weights"], "weights of one process, then of two", subject.tolerance)
    assert_same(_rates(alone), _rates(first), "learning rates of one process, then of two")


def ranks_agree(subject: Subject) -> dict[str, Any]:
    """Two gloo processes under DDP end in the same state as each other. Returns the first one's."""
    first, second = run_ranks(lambda rank: subject.fit(subject.model(), subject.build(), world=2).state)
    for part in ("weights", "optimizers"):
        assert_same(first[part], second[part], f"{part} of rank 0, then of rank 1")
    for part in ("learning rate", "frozen"):
        traces = [{name: step.get(part) for name, step in state["steps"].items()} for state in (first, second)]
        assert_same(*traces, f"{part} of rank 0, then of rank 1")
    return first


# Resuming


def resumes(
    subject: Subject,
    *,
    after_epochs: int = 0,
    after_steps: int = 0,
    after_batches: int = 0,
    dropout: float = 0.0,
    random: bool = False,
    **options: Any,
) -> None:
    """A run killed after a checkpoint and resumed in a fresh process ends in the same state, bit for bit.

    Args:
        subject: What is checked.
        after_epochs: Kill at the end of this many epochs, or
        after_steps: after this many optimizer steps, or
        after_batches: after this many batches.
        dropout: Of the model. Needs a technique whose checkpoints hold the global random state.
        random: Whether the global random state is compared too.
        options: For :func:`eke.testing.fit`.
    """
    options = {"epochs": subject.epochs, "steps": subject.steps, **subject.options, **options}
    unbroken, resumed = run.resume(
        lambda seed: subject.model(seed=seed, dropout=dropout),
        subject.build,
        after_epochs=after_epochs,
        after_steps=after_steps,
        after_batches=after_batches,
        **options,
    )
    per_step = options.get("accumulate_grad_batches", 1)
    done = after_epochs * options["steps"] or after_steps * per_step or after_batches
    left = list(unbroken["steps"])[done:]
    if after_epochs and subject.chooses_samples:
        left = [name for name in unbroken["steps"] if int(name.split()[1]) >= after_epochs]
    assert list(resumed["steps"]) == left, (
        f"batches after the kill: {_some(left)}; the resumed run trained: {_some(list(resumed['steps']))}"
    )
    pair = [comparable(state, random, left) for state in (unbroken, resumed)]
    assert_same(*pair, "state of the unbroken run, then of the resumed one")


def comparable(state: dict[str, Any], random: bool, steps: list[str]) -> dict[str, Any]:
    """The parts of a state that resuming has to give back: of the trace, the batches after the kill."""
    unseen = set() if random else {"random state"}
    kept = {
        name: {key: value for key, value in state["steps"].get(name, {}).items() if key not in unseen} for name in steps
    }
    left_out = {"steps"} if random else {"steps", "random"}
    return {"steps": kept, **{key: value for key, value in state.items() if key not in left_out}}


def loads_without_it(subject: Subject) -> str | None:
    """Its checkpoint resumes in a run without it, or is refused with words that name it. Returns the refusal."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"epochs": subject.epochs, "steps": subject.steps, **subject.options}
        ckpt = run.interrupt(folder, lambda seed: subject.model(seed=seed), subject.build, after_epochs=1, **options)
        try:
            subject.fit(subject.model(), ckpt=ckpt)
        except REFUSALS as error:
            refusal = str(error)
        except Exception as error:
            raise AssertionError(f"its checkpoint fails to load without it: {type(error).__name__}: {error}") from error
        else:
            return None
    names = {type(subject.build()).__name__, getattr(subject.record, "name", "")} - {""}
    assert any(name in refusal for name in names), f"the refusal does not name it: {refusal}"
    return refusal


def weights_only_checkpoint_loads(subject: Subject) -> None:
    """A weights-only checkpoint gives the trained weights back, in a model that was never trained."""
    import eke

    done = subject.fit(subject.model(), subject.build())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.ckpt")
        done.trainer.save_checkpoint(path, weights_only=True)
        saved = torch.load(path, weights_only=True)["state_dict"]
        if subject.record is None:
            loaded = subject.model.load_from_checkpoint(path, seed=1)
        else:
            loaded = eke.load_from_checkpoint(subject.model, path, callbacks=[subject.build()])
    assert_same(dict(saved), dict(loaded.state_dict()), "weights in the checkpoint, then in the loaded model")
    _batch = next(iter(subject.model().train_dataloader()))
    done.model.eval(), loaded.eval()
    with torch.no_grad():
        assert_same(done.model.loss(_batch), loaded.loss(_batch), "loss of the trained model, then of the loaded one")


# Leaving things alone


def changes_nothing_when_off(subject: Subject) -> None:
    """Built, copied and used in another run, it changes nothing in a run that does not have it."""

    def with_it_around() -> dict[str, Any]:
        technique = subject.build()
        copy.deepcopy(technique)
        subject.fit(subject.model(seed=2), technique)
        return subject.fit(subject.model(dropout=0.1)).state

    alone = run_alone(lambda: subject.fit(subject.model(dropout=0.1)).state)
    assert_same(alone, run_alone(with_it_around), "state of a run that never had it, then of one beside it")
    if subject.idle is not None:
        parts = ("weights", "steps", "optimizers", "random")
        idle = run_alone(lambda: subject.fit(subject.model(dropout=0.1), subject.idle()).state)
        pair = [{part: state[part] for part in parts} for state in (alone, idle)]
        assert_same(*pair, "state of a run without it, then with it switched off")


def leaves_the_random_state_alone(subject: Subject) -> None:
    """It draws no number from the global random states of torch, Python and numpy."""
    without = subject.fit(subject.model()).state
    with_it = subject.fit(subject.model(), subject.build()).state
    names = with_it["steps"] if subject.chooses_samples else without["steps"]
    traces = [
        {
            **{name: step["random state"] for name, step in state["steps"].items() if name in names},
            "end": state["random"],
        }
        for state in (without, with_it)
    ]
    assert_same(*traces, "checksum of the global random state without it, then with it")


def leaves_the_model_as_it_was(subject: Subject) -> None:
    """After a run no class, hook, attribute or replaced method of it is left on the model, nor on any class."""
    plain, model = subject.model(), subject.model()
    subject.fit(plain, validate=True)
    classes = class_attributes(model)
    subject.fit(model, subject.build(), validate=True)
    _assert_untouched(plain, model, "after a run")
    assert_same(classes, class_attributes(model), "attributes of the model's classes before a run, then after it")


def does_what_its_record_says(subject: Subject) -> None:
    """What the record does not declare stays as in a run without it, and numbers are as exact as it says."""
    without = subject.fit(subject.model()).state
    with_it = subject.fit(subject.model(), subject.build()).state
    if subject.chooses_samples:
        without["steps"] = {name: step for name, step in without["steps"].items() if name in with_it["steps"]}
    undeclared = []

    def compare(resources: tuple[str, ...], what: str, take: Callable[[dict[str, Any]], Any]) -> None:
        if not subject.touches(*resources) and (found := differences(take(without), take(with_it))):
            undeclared.append(f"{what} changed, and {' or '.join(map(repr, resources))} is not declared: {found[0]}")

    compare(("learning rate",), "the learning rate", _rates)
    compare(("requires_grad", "module tree"), "requires_grad", lambda state: _trace(state, "frozen"))
    compare(("samples", "batch content", "batch subset"), "the batches", lambda state: _trace(state, "batch"))
    compare(("module tree",), "names and shapes of weights", lambda state: _shapes(state["weights"]))
    compare(("optimizer",), "the class of the optimizer", lambda state: state["optimizer classes"])
    assert not undeclared, "\n".join(undeclared)
    exactness = subject.record.exactness if subject.record else "model-changing"
    tolerance = {"exact": 0.0, "reordered sums": subject.tolerance}.get(exactness)
    if tolerance is not None:
        what = f"weights without it, then with it (its record says {exactness!r})"
        assert_same(without["weights"], with_it["weights"], what, tolerance)


def fails_cleanly(subject: Subject, where: str) -> None:
    """When user code raises, the model stands as it would without the technique, and a second fit works.

    Args:
        subject: What is checked.
        where: ``"training_step"``, ``"validation_step"``, ``"configure_optimizers"`` or ``"on_fit_start"``.
    """
    with _empty_folder() as folder:
        plain, model, technique = _failing(subject.model, where), _failing(subject.model, where), subject.build()
        classes = class_attributes(model)
        watch = _LastWeights()
        _fit_that_fails(subject, plain)
        _fit_that_fails(subject, model, technique, callbacks=[watch], default_root_dir=folder)
        what = f"after an exception in {where}"
        _assert_untouched(plain, model, what)
        assert_same(classes, class_attributes(model), f"attributes of the model's classes before, then {what}")
        now = copied(dict(tensors(model)))
        shared = [name for name in watch.weights if name in now and now[name].shape == watch.weights[name].shape]
        pair = [{name: weights[name] for name in shared} for weights in (watch.weights, now)]
        assert_same(*pair, f"weights when the last batch began or ended, then {what}")
        left = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
        assert not left, f"files left {what}: {_some(left)}"
        model.fails = False
        again = subject.fit(model, technique, validate=True, default_root_dir=folder)
        _finite_losses(again.state)
        plain.fails = False
        subject.fit(plain, validate=True)
        _assert_untouched(plain, model, f"after a second fit {what}")


def pickles_and_copies(subject: Subject) -> None:
    """The technique pickles and deep-copies before and after a run; so does the model, in mid-run too."""
    for name, duplicate in (("pickled", _pickled), ("deep-copied", copy.deepcopy)):
        technique = subject.build()
        twin = _try(name, "a new technique", duplicate, technique)
        states = [subject.fit(subject.model(), one).state for one in (technique, twin)]
        assert_same(*states, f"state after a run with the technique, then with one {name}")
    watch, technique = _CopyInMidRun(), subject.build()
    done = subject.fit(subject.model(), technique, callbacks=[watch])
    assert watch.problem is None, watch.problem
    for name, duplicate in (("pickled", _pickled), ("deep-copied", copy.deepcopy)):
        _try(name, "the technique after a run", duplicate, technique)
        twin = _try(name, "the model after a run", duplicate, done.model)
        assert_same(dict(done.model.state_dict()), dict(twin.state_dict()), f"weights of the model, then {name}")


def a_command_line_builds_it(subject: Subject) -> None:
    """A LightningCLI builds it from its class path and arguments in a YAML file, and trains."""
    run_alone(lambda: _command_line(subject))


def fits_twice_validates_and_tests(subject: Subject) -> None:
    """One technique object serves fit, validate, test and fit again, with the same Trainer and with a new one."""
    model, technique = subject.model(), subject.build()
    done = subject.fit(model, technique, validate=True)
    first = list(done.state["steps"])
    with run.quiet():
        for stage in ("validate", "test"):
            before = copied(dict(tensors(model)))
            getattr(done.trainer, stage)(model, verbose=False)
            assert_same(before, copied(dict(tensors(model))), f"weights before {stage}, then after it")
        done.trainer.fit_loop.max_epochs += 1
        done.trainer.fit(model, model.train_dataloader(), model.val_dataloader())
    assert done.trainer.current_epoch == subject.epochs + 1, "the second fit of the same Trainer did not train"
    again = subject.fit(model, technique, validate=True)
    whole = len(first) if subject.chooses_samples else subject.epochs * subject.steps
    assert len(again.state["steps"]) == whole, "the second fit with a new Trainer was short"
    _finite_losses(again.state)


def costs_nothing_when_idle(subject: Subject) -> None:
    """Where it has nothing to do in a step, it adds no operator and few Python calls over an empty callback."""
    build = subject.idle or subject.build
    calls = [_least(subject, technique, count.CountCalls()) for technique in (Callback(), build())]
    operators = [_least(subject, technique, count.CountOperators()) for technique in (Callback(), build())]
    assert operators[1] <= operators[0], f"{operators[1] - operators[0]} operators more than an empty callback's run"
    extra = calls[1] - calls[0]
    assert extra <= subject.extra_calls, (
        f"{extra} Python calls a step more than an empty callback's run ({calls[0]}); allowed: {subject.extra_calls}"
    )


# Parts


class _FirstStep(Callback):
    stepped = False

    def on_after_backward(self, *_: Any) -> None:
        self.stepped = True


class _LastWeights(Callback):
    """The weights when a batch begins, after what techniques do to them there, and when it is through."""

    def __init__(self) -> None:
        self.weights: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: Any, model: LightningModule, *_: Any) -> None:
        self.weights = copied(dict(tensors(model)))

    def on_train_batch_end(self, trainer: Any, model: LightningModule, *_: Any) -> None:
        self.weights = copied(dict(tensors(model)))


class _CopyInMidRun(Callback):
    """Copies the model in mid-run and makes first the copy's weights NaN, then its own: neither may see the other."""

    problem: str | None = None

    def on_train_batch_end(self, trainer: Any, model: LightningModule, outputs: Any, batch: Any, index: int) -> None:
        if self.problem is not None or trainer.global_step != 2:
            return
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            before = model.loss(batch)
            try:
                twin = copy.deepcopy(model)
                same = torch.equal(twin.loss(batch), before)
                other = copy.deepcopy(model)
            except Exception as error:
                self.problem = f"the model cannot be deep-copied in mid-run: {type(error).__name__}: {error}"
                return
            for weight in twin.parameters():
                weight.fill_(torch.nan)
            if not torch.equal(model.loss(batch), before):
                self.problem = "a deep copy made in mid-run shares weights with the model"
                return
            kept = [weight.clone() for weight in model.parameters()]
            for weight in model.parameters():
                weight.fill_(torch.nan)
            if not torch.equal(other.loss(batch), before):
                self.problem = "a deep copy made in mid-run computes with weights that are not its own"
            elif not same:
                self.problem = "a deep copy made in mid-run computes another loss than the model"
            for weight, value in zip(model.parameters(), kept, strict=True):
                weight.copy_(value)


def _failing(model: type[TinyModel], where: str) -> TinyModel:
    """A model that raises at ``where``: in the training step at the sixth batch, elsewhere at the first call."""

    def raises(self: Any, *arguments: Any, **named: Any) -> Any:
        late = where != "training_step" or self.trainer.fit_loop.total_batch_idx >= 5
        if self.fails and late:
            raise _UserError(where)
        return getattr(model, where)(self, *arguments, **named)

    if where == "training_step":

        def method(self: Any, batch: Any, batch_idx: int) -> Any:
            return raises(self, batch, batch_idx)

    elif where == "validation_step":

        def method(self: Any, batch: Any, batch_idx: int) -> Any:
            return raises(self, batch, batch_idx)

    else:

        def method(self: Any) -> Any:
            return raises(self)

    built = type(f"Failing{model.__name__}", (model,), {where: method, "fails": True})()
    built.fails = True
    return built


class _UserError(Exception):
    pass


def _fit_that_fails(subject: Subject, model: TinyModel, *techniques: object, **options: Any) -> None:
    try:
        subject.fit(model, *techniques, validate=True, **options)
    except _UserError:
        return
    raise AssertionError("the exception of the user's code did not come through")


@contextmanager
def _empty_folder() -> Iterator[str]:
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(here)


def _assert_untouched(plain: LightningModule, model: LightningModule, when: str) -> None:
    """Compare the modules that both have: a technique may add some, if what it adds trains like any other."""
    without, with_it = footprint(plain), footprint(model)
    shared = [name for name in without if name in with_it]
    pair = [{name: stands[name] for name in shared} for stands in (without, with_it)]
    assert_same(*pair, f"how the model's modules stand {when} without it, then with it")


def _command_line(subject: Subject) -> None:
    import yaml
    from lightning.pytorch.cli import LightningCLI

    technique = subject.build()
    model = f"{subject.model.__module__}.{subject.model.__qualname__}"
    entry = {"class_path": f"{type(technique).__module__}.{type(technique).__qualname__}"}
    if subject.arguments:
        entry["init_args"] = subject.arguments
    argument = registry.trainer_argument(technique)
    trainer = {
        "max_epochs": subject.epochs,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **subject.options,
        argument: entry if argument == "strategy" else [entry],
    }
    with run.quiet(), _empty_folder() as folder:
        Path(folder, "config.yaml").write_text(yaml.safe_dump({"model": {"class_path": model}, "trainer": trainer}))
        try:
            cli = LightningCLI(
                LightningModule, subclass_mode_model=True, run=False, save_config_callback=None,
                args=["--config", "config.yaml"],
            )  # fmt: skip
        except SystemExit as error:
            raise AssertionError(f"LightningCLI does not build it from {entry}") from error
        built = [*cli.trainer.callbacks, cli.trainer.precision_plugin, cli.trainer.strategy]
        assert any(type(one) is type(technique) for one in built), f"no {entry['class_path']} in the Trainer it built"
        cli.trainer.fit(cli.model)


def _least(subject: Subject, technique: object, counter: Any) -> int:
    subject.fit(subject.model(), technique, callbacks=[counter])
    return min(counter.per_step)


def _finite_losses(state: dict[str, Any]) -> None:
    bad = [name for name, step in state["steps"].items() if step.get("loss") is None or step["loss"] - step["loss"]]
    assert not bad, f"the loss is not finite at: {_some(bad)}"


def _trace(state: dict[str, Any], part: str) -> dict[str, Any]:
    return {name: step.get(part) for name, step in state["steps"].items()}


def _rates(state: dict[str, Any]) -> list[Any]:
    """Learning rate of each group at each optimizer step."""
    return [step["learning rate"] for step in state["steps"].values() if "learning rate" in step]


def _shapes(weights: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second)


def _pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def _try(name: str, what: str, duplicate: Callable[[Any], Any], value: Any) -> Any:
    try:
        return duplicate(value)
    except Exception as error:
        raise AssertionError(f"{what} cannot be {name}: {type(error).__name__}: {error}") from error


def _some(names: list[str], show: int = 6) -> str:
    more = f" and {len(names) - show} more" if len(names) > show else ""
    return ", ".join(names[:show]) + more


def transformers_missing() -> bool:
    """Whether the Hugging Face shape cannot be built on this machine."""
    return importlib.util.find_spec("transformers") is None

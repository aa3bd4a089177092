"""The contract as test classes: inherit one, override ``build``, and pytest runs every promise."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
from eke.testing import checks, effects
from eke.testing.certify import EXCEPTED
from eke.testing.data import Loader, shuffled
from eke.testing.models import SHAPES, STEPS, TinyBlocks, TinyGPT2, TinyModel
from eke.testing.run import EPOCHS, Cut
from eke.testing.zoo import ZOO, Animal


def exercises(**what: str) -> Callable[[Callable], Callable]:
    """Say which strategy or precision a test exercises; a certificate lists those that passed."""

    def mark(test: Callable) -> Callable:
        test.eke_exercises = what
        return test

    return mark


class ZooContract:
    """On every model of the zoo (:mod:`eke.testing.zoo`) a technique trains for a few steps and does what it promises
    there, or refuses in words that help. Part of :class:`TechniqueContract`; alone for what is no subject of it.

    Override :meth:`shows` with what the technique's README promises.
    """

    eke_zoo: ClassVar[bool] = True

    zoo: ClassVar[tuple[str, ...] | None] = None  # names of animals; all that can be built here by default
    zoo_run: ClassVar[Mapping[str, Any]] = {}  # epochs, batches and Trainer arguments of a run there

    def build(self) -> object:
        """Make a new technique object."""
        raise NotImplementedError(f"{type(self).__name__} has no build(): return a new technique object from it.")

    def build_in_zoo(self, animal: Animal) -> object:
        """Make one that has something to do in a run of a few steps on models of two or three blocks."""
        return self.build()

    def shows(self, plain: checks.Seen, seen: checks.Seen) -> str:
        """Hold a run with the technique against the same run without, by what its README promises.

        Returns:
            In a few words what came of it, for the table.

        Raises:
            AssertionError: the promise is not kept. By default: nothing at all is different.
        """
        return checks.differs(plain, seen)

    def test_in_the_zoo_it_trains_or_says_why_not(
        self, animal: str, record_property: Callable[..., None], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        came = checks.meets(ZOO[animal], self.build_in_zoo, self.shows, **self.zoo_run)
        record_property("zoo", came)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "animal" in metafunc.fixturenames:
            here = [name for name, animal in ZOO.items() if not animal.missing]
            metafunc.parametrize("animal", [name for name in here if self.zoo is None or name in self.zoo])


class CallbackContract:
    """What holds for any Lightning callback, plugin or strategy that leaves a run resumable and a model whole.

    Override :meth:`build`. A promise that cannot hold is named in ``exceptions`` with the sentence why; its test is
    skipped with that sentence. The other attributes are for techniques that need them.
    """

    eke_contract: ClassVar[bool] = True

    model: ClassVar[type[TinyModel]] = TinyBlocks  # what all tests but those of the shapes train
    shapes: ClassVar[tuple[type[TinyModel], ...]] = SHAPES  # models that it must train; others it may refuse
    epochs: ClassVar[int] = EPOCHS  # of each run
    steps: ClassVar[int] = STEPS  # batches in an epoch
    cuts: ClassVar[tuple[int, ...]] = (2, 6, 9)  # optimizer steps after which a run is killed in mid-epoch
    frozen: ClassVar[tuple[str, ...]] = ()  # patterns of weights that are meant to stay as they are
    tolerance: ClassVar[float] = 1e-5  # of weights, where sums may be taken in another order
    extra_calls: ClassVar[int] = 20  # Python calls it may add to a step in which it has nothing to do
    arguments: ClassVar[Mapping[str, Any]] = {}  # by which a LightningCLI builds it
    options: ClassVar[Mapping[str, Any]] = {}  # Trainer arguments of every run
    resuming: ClassVar[Mapping[str, Any]] = {}  # arguments of every check that resumes
    within_windows: tuple[Cut, ...] = ()  # further cuts of a run that accumulates two batches
    exceptions: ClassVar[Mapping[str, str]] = {}  # name of a test to the sentence why it cannot hold

    def build(self) -> object:
        """Make a new technique object."""
        raise NotImplementedError(f"{type(self).__name__} has no build(): return a new technique object from it.")

    def idle(self) -> object:
        """Make a technique that is in the run but has nothing to do in it, where one can be made."""
        return None

    def subject(self, **changes: Any) -> checks.Subject:
        """What the checks need to know, from the attributes of this class."""
        given = {
            "build": self.build,
            "model": self.model,
            "epochs": self.epochs,
            "steps": self.steps,
            "frozen": self.frozen,
            "tolerance": self.tolerance,
            "idle": self.idle if self.idle() is not None else None,
            "arguments": dict(self.arguments),
            "extra_calls": self.extra_calls,
            "options": dict(self.options),
        }
        return checks.Subject(**{**given, **changes})

    # Once for the class: a misspelt exception would otherwise switch nothing off, or something for nobody to see.
    def test_every_exception_names_a_test_of_the_contract(self) -> None:
        unknown = sorted(set(self.all_exceptions()) - set(self.items()))
        assert not unknown, f"exceptions names no test: {', '.join(unknown)}. The tests: {', '.join(self.items())}"
        blank = sorted(name for name, why in self.all_exceptions().items() if len(why.split()) < 3)
        assert not blank, f"an exception needs a sentence why it cannot hold: {', '.join(blank)}"

    @exercises(strategy="single device", precision="32-true")
    def test_it_trains_and_every_weight_moves(self, shape: type[TinyModel]) -> None:
        if shape is TinyGPT2 and checks.transformers_missing():
            pytest.skip("transformers is not installed, so the Hugging Face shape was not trained")
        checks.trains_or_refuses(self.subject(model=shape), may_refuse=shape not in self.shapes)

    def test_the_loss_falls(self) -> None:
        checks.loss_falls(self.subject())

    def test_a_run_resumed_at_an_epoch_end_reaches_the_same_bits(self) -> None:
        cuts = [Cut(epochs=epoch) for epoch in range(1, self.epochs)]
        checks.resumes(self.subject(), *cuts, killed=False, **self.resuming)

    def test_a_run_killed_in_mid_epoch_resumes_to_the_same_bits(self) -> None:
        checks.resumes(self.subject(), *(Cut(steps=step) for step in self.cuts), **self.resuming)

    def test_a_run_with_loader_workers_resumes_to_the_same_bits(self) -> None:
        checks.resumes(self.subject(), Cut(steps=self.cuts[-1]), killed=False, workers=1, **self.resuming)

    def test_a_run_with_accumulated_gradients_resumes_to_the_same_bits(self) -> None:
        subject = self.subject(steps=2 * self.steps)
        cuts = [Cut(steps=self.cuts[0]), *self.within_windows]
        checks.resumes(subject, *cuts, killed=False, accumulate_grad_batches=2, **self.resuming)

    def test_it_leaves_the_global_random_state_alone(self) -> None:
        checks.leaves_the_random_state_alone(self.subject())

    def test_switched_off_it_changes_nothing(self) -> None:
        checks.changes_nothing_when_off(self.subject())

    def test_after_a_run_the_model_is_as_before(self) -> None:
        checks.leaves_the_model_as_it_was(self.subject())

    def test_accumulated_gradients_equal_the_big_batch(self) -> None:
        checks.accumulation_equals_the_big_batch(self.subject())

    @exercises(precision="bf16-mixed")
    def test_it_trains_in_bf16(self) -> None:
        checks.trains_in_bf16(self.subject())

    def test_gradients_are_clipped(self) -> None:
        checks.clips_gradients(self.subject())

    @exercises(compiled="torch.compile")
    def test_under_torch_compile_it_reaches_the_same_weights(self) -> None:
        checks.compiles(self.subject())

    @exercises(strategy="ddp")
    def test_two_processes_equal_one(self) -> None:
        checks.ranks_equal_one_process(self.subject())

    def test_two_processes_resume_to_the_same_bits(self) -> None:
        checks.ranks_resume(self.subject(), after_batches=self.cuts[-1], loader=self.resuming.get("loader", Loader))

    @pytest.mark.parametrize("where", ["training_step", "validation_step", "configure_optimizers", "on_fit_start"])
    def test_it_fails_cleanly(self, where: str) -> None:
        checks.fails_cleanly(self.subject(), where)

    def test_it_pickles_and_deep_copies(self) -> None:
        checks.pickles_and_copies(self.subject())

    def test_a_command_line_builds_it(self) -> None:
        checks.a_command_line_builds_it(self.subject())

    def test_it_fits_twice_validates_and_tests(self) -> None:
        checks.fits_twice_validates_and_tests(self.subject())

    def test_its_checkpoint_loads_without_it_or_says_why_not(self) -> None:
        checks.loads_without_it(self.subject())

    def test_a_weights_only_checkpoint_loads(self) -> None:
        checks.weights_only_checkpoint_loads(self.subject())

    def test_it_costs_nothing_when_it_has_nothing_to_do(self) -> None:
        checks.costs_nothing_when_idle(self.subject())

    # How pytest meets the class

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "shape" in metafunc.fixturenames:
            metafunc.parametrize("shape", SHAPES, ids=[shape.__name__ for shape in SHAPES])

    @pytest.fixture(autouse=True)
    def skip_what_cannot_hold(self, request: pytest.FixtureRequest) -> None:
        """Skip a test that the technique excepts, with the sentence why."""
        name = request.function.__name__
        if name in self.all_exceptions():
            pytest.skip(f"{EXCEPTED}{self.all_exceptions()[name]}")

    @classmethod
    def items(cls) -> list[str]:
        """Names of the contract's tests."""
        contract = next(base for base in cls.__mro__ if base.__module__ == __name__)
        return [name for name, _ in inspect.getmembers(contract, inspect.isfunction) if name.startswith("test_")]

    @functools.cached_property
    def _record_exceptions(self) -> Mapping[str, str]:
        record = self.subject().record
        return record.exceptions if record else {}

    def all_exceptions(self) -> dict[str, str]:
        """What cannot hold and why: from the technique's record and from this class."""
        return {**self._record_exceptions, **self.exceptions}


class TechniqueContract(ZooContract, CallbackContract):
    """What every technique of Eke promises: all of the above, random state, declared effects and the zoo as well.

    Three lines are enough::

        class TestContract(TechniqueContract):
            def build(self):
                return Stacking(...)

    Exceptions are read from the technique's record. Runs that resume have a stock loader that shuffles and a model with
    dropout, are cut within accumulation windows too, and the global random state is compared: the core keeps all of it.
    """

    resuming: ClassVar[Mapping[str, Any]] = {"loader": shuffled, "random": True, "dropout": 0.1}

    @property
    def within_windows(self) -> tuple[Cut, ...]:  # the core keeps the gradients of a window that is cut
        return (Cut(batches=2 * self.cuts[0] + 1),)

    unseen: ClassVar[Mapping[str, str]] = {}  # effects that a run of a dozen steps cannot show, to the sentence why

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        CallbackContract.pytest_generate_tests(self, metafunc)
        ZooContract.pytest_generate_tests(self, metafunc)

    def test_it_has_a_record(self) -> None:
        record = self.subject().record
        assert record is not None, f"{type(self.build()).__name__}.technique is no eke.Technique"
        import eke

        try:
            installed = eke.get(record.name)
        except eke.EkeError as error:
            raise AssertionError(
                f"{error} Name it in pyproject.toml under [project.entry-points.eke] and install that. For a technique "
                "of a script: exceptions = {'test_it_has_a_record': 'It is not installed.'}"
            ) from None
        assert installed == record, f"the registry holds another record under {record.name!r}"

    def test_it_does_what_its_record_says(self) -> None:
        checks.does_what_its_record_says(self.subject())

    def test_each_effect_of_its_record_is_seen_and_no_other(self) -> None:
        effects.proves_its_effects(self.subject(), self.unseen)

    def other(self) -> object:
        """Make the technique with an argument that is another, where none is found by itself."""
        return checks.another(self.build)

    def test_resumed_with_another_argument_without_it_or_added_it_says_so(self) -> None:
        checks.says_what_changed(self.subject(), self.other if self.other() is not None else None)

    def test_its_steps_do_not_depend_on_what_may_change(self) -> None:
        checks.steps_do_not_depend_on_what_may_change(self.subject())

    def test_beside_a_second_pass_it_sees_one_step(self) -> None:
        checks.sees_one_step_beside_a_second_pass(self.subject())

    def test_two_processes_that_resume_within_an_accumulation_window_are_in_one_state(self) -> None:
        subject = self.subject(steps=2 * self.steps)
        checks.ranks_resume(
            subject, after_batches=2 * self.cuts[0] + 1, accumulate_grad_batches=2, loader=self.resuming["loader"]
        )

"""A technique trains: alone, in bf16, with gradients accumulated or clipped, compiled, on several processes."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import torch
from eke import Technique
from eke.technique import TechniqueCallback
from eke.testing import run
from eke.testing.checks.common import REFUSALS, assert_same_weights, equal, finite_losses, learning_rates, some
from eke.testing.checks.subject import Subject
from eke.testing.compare import assert_same, copied
from eke.testing.data import BATCH
from eke.testing.ranks import run_alone, run_ranks
from lightning.pytorch import Callback


def trains(subject: Subject, **options: Any) -> run.Run:
    """Every weight that is not declared frozen moves, and everything stays finite."""
    model = subject.model()
    before = copied(dict(model.named_parameters()))
    done = subject.fit(model, subject.build(), **options)
    after = done.state["weights"]
    broken = [name for name, weight in after.items() if weight.is_floating_point() and not weight.isfinite().all()]
    assert not broken, f"not finite after training: {some(broken)}"
    stuck = [name for name, weight in before.items() if name in after and equal(weight, after[name])]
    stuck = [name for name in stuck if not any(fnmatch(name, pattern) for pattern in subject.frozen)]
    assert not stuck, f"did not move in training and are not declared in frozen: {some(stuck)}"
    lost = [name for name in before if name not in after]
    assert not lost or subject.touches("module tree"), f"gone after training, undeclared: {some(lost)}"
    finite_losses(done.state)
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
    assert not long, f"gradients longer than gradient_clip_val={limit}: {some(long)}"
    assert any(norms.values()), "no gradient was left to look at after any step"
    finite_losses(state)


def accumulation_equals_the_big_batch(subject: Subject) -> None:
    """Two accumulated batches move the weights as one batch of twice the size does."""
    small = subject.fit(subject.model(), subject.build(), steps=2 * subject.steps, accumulate_grad_batches=2)
    large = subject.fit(subject.model(), subject.build(), batch=2 * BATCH)
    rates = [learning_rates(done.state) for done in (small, large)]
    assert_same(*rates, "learning rates under accumulation, then with the big batch")
    weights = [done.state["weights"] for done in (small, large)]
    what = "weights under accumulation, then with the big batch"
    assert_same_weights(subject.model, *weights, what, subject.tolerance)


def compiles(subject: Subject) -> None:
    """Under torch.compile it trains to the weights that it reaches without: for two epochs, since each shape that a
    technique makes is compiled anew."""

    def weights(backend: str | None) -> dict[str, Any]:
        model = subject.model()
        model = torch.compile(model, backend=backend) if backend else model
        return subject.fit(model, subject.build(), epochs=2).state["weights"]

    plain, compiled = run_alone(lambda: weights(None)), run_alone(lambda: weights("aot_eager"))
    assert_same_weights(
        subject.model, plain, compiled, "weights without torch.compile, then with it", subject.tolerance
    )


def ranks_equal_one_process(subject: Subject) -> None:
    """Two gloo processes under DDP end in the same state as each other, and near one process with twice the batch."""
    first = ranks_agree(subject)
    alone = run_alone(lambda: subject.fit(subject.model(), subject.build(), batch=2 * BATCH).state)
    what = "weights of one process, then of two"
    assert_same_weights(subject.model, alone["weights"], first["weights"], what, subject.tolerance)
    assert_same(learning_rates(alone), learning_rates(first), "learning rates of one process, then of two")


def ranks_agree(subject: Subject) -> dict[str, Any]:
    """Two gloo processes under DDP end in the same state as each other. Returns the first one's."""
    first, second = run_ranks(lambda rank: subject.fit(subject.model(), subject.build(), world=2).state)
    for part in ("weights", "optimizers"):
        assert_same(first[part], second[part], f"{part} of rank 0, then of rank 1")
    for part in ("learning rate", "frozen"):
        traces = [{name: step.get(part) for name, step in state["steps"].items()} for state in (first, second)]
        assert_same(*traces, f"{part} of rank 0, then of rank 1")
    return first


def sees_one_step_beside_a_second_pass(subject: Subject) -> None:
    """Beside a method that computes each gradient twice, at the same weights, a run is what it is without: in both
    passes it does the same, and what it counts and draws goes on by one step."""

    def state(*others: object) -> dict[str, Any]:
        whole = subject.fit(subject.model(dropout=0.1), subject.build(), *others).state
        return {part: whole[part] for part in ("weights", "steps", "optimizers", "random")}

    without = run_alone(state)
    beside = run_alone(lambda: _unless_refused(lambda: state(SecondPass())))
    if beside is not None:
        assert_same(without, beside, "state of a run, then of one in which each step has a second pass")


def _unless_refused(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except REFUSALS:
        return None


class SecondPass(TechniqueCallback):
    """A two-pass method without an idea: its second pass is at the weights of the first."""

    technique = Technique(name="second_pass", kind="callback", effects=("replaces gradients",))
    passes = 2

    def before_optimizer_step(self, run: Any, optimizer: Any) -> None:
        run.second_pass()


class _FirstStep(Callback):
    stepped = False

    def on_after_backward(self, *_: Any) -> None:
        self.stepped = True

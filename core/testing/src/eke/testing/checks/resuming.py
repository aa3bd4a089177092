"""A technique goes on from a checkpoint: after a kill, without itself, and as weights alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from eke.testing import run
from eke.testing.checks.common import REFUSALS, some
from eke.testing.checks.subject import Subject
from eke.testing.compare import assert_same
from eke.testing.ranks import run_ranks


def resumes(
    subject: Subject,
    *cuts: run.Cut,
    killed: bool = True,
    dropout: float = 0.0,
    random: bool = False,
    **options: Any,
) -> None:
    """A run that goes on from a checkpoint in a fresh process ends in the state of an unbroken one, bit for bit.

    Args:
        subject: What is checked.
        cuts: When checkpoints are written, in this order; the run is resumed from each.
        killed: Whether the process that writes them dies at the last; else the unbroken run writes them in passing.
        dropout: Of the model. Needs a technique whose checkpoints hold the global random state.
        random: Whether the global random state is compared too.
        options: For :func:`eke.testing.fit`.
    """
    options = {"epochs": subject.epochs, "steps": subject.steps, **subject.options, **options}
    unbroken, every = run.resume(
        lambda seed: subject.model(seed=seed, dropout=dropout), subject.build, cuts, killed=killed, **options
    )
    per_step = options.get("accumulate_grad_batches", 1)
    for cut, resumed in zip(cuts, every, strict=True):
        done = cut.epochs * options["steps"] or cut.steps * per_step or cut.batches
        left = list(unbroken["steps"])[done:]
        if cut.epochs and subject.chooses_samples:
            left = [name for name in unbroken["steps"] if int(name.split()[1]) >= cut.epochs]
        assert list(resumed["steps"]) == left, (
            f"batches after {cut}: {some(left)}; the resumed run trained: {some(list(resumed['steps']))}"
        )
        pair = [comparable(state, random, left) for state in (unbroken, resumed)]
        assert_same(*pair, f"state of the unbroken run, then of the one resumed from {cut}")


def ranks_resume(subject: Subject, *, after_batches: int, **options: Any) -> None:
    """Two processes that resume are in one state, and in the state of two that never stopped, each of its own.

    A checkpoint is one process's file: what the others had drawn, chosen and counted has to be in it too.

    Args:
        subject: What is checked.
        after_batches: When the checkpoint is written, in passing; may be within an accumulation window.
        options: For :func:`eke.testing.fit`.
    """

    def one_of_two(rank: int, **more: Any) -> dict[str, Any]:
        return subject.fit(subject.model(seed=more.get("seed", 0)), subject.build(), world=2, **options, **more).state

    with tempfile.TemporaryDirectory() as folder:
        ckpt = Path(folder, "cut.ckpt")
        whole = run_ranks(lambda rank: one_of_two(rank, callbacks=[run.SaveAfter(ckpt, after_batches)]))
        assert ckpt.exists(), "the run ended before its checkpoint was written."
        rest = run_ranks(lambda rank: one_of_two(rank, ckpt=ckpt, seed=1))
    for part in ("weights", "optimizers"):
        assert_same(rest[0][part], rest[1][part], f"{part} of rank 0, then of rank 1, both resumed")
    for rank, (before, after) in enumerate(zip(whole, rest, strict=True)):
        left = list(after["steps"])
        assert left, f"rank {rank} trained no batch after it resumed"
        pair = [comparable(state, False, left) for state in (before, after)]
        for one in pair:
            one.pop("saved", None)  # of the first rank alone
        assert_same(*pair, f"state of rank {rank} in an unbroken run, then in a resumed one")


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
        (ckpt,) = run.interrupt(folder, subject.model, subject.build, [run.Cut(epochs=1)], **options)
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

"""Sequence-length warm-up: train on short sequences first and let them grow to their full length.

Source: Li, Zhang, He, "The Stability-Efficiency Dilemma: Investigating Sequence Length Warmup for Training GPT Models",
NeurIPS 2022, https://arxiv.org/abs/2108.06084, section 4. Survey section 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from eke import EkeError, Run, Technique, TechniqueCallback, in_run
from eke.seams.progress import Until
from eke.seams.step import fails_too

from eke_length_warmup.entry import RECORD
from eke_length_warmup.sequence import SequenceError, cut, divide, find_sequences, row_length


def length_at(step: float, duration: float, start: int, full: int, multiple: int) -> int:
    """Length of the sequences at an optimizer step: a straight line from ``start`` to ``full`` at ``duration`` steps.

    Rounded down to a multiple; never below the smaller of ``start`` and ``full``, nor above ``full``, which comes as
    it is, a multiple or not.

    Source:
        Li et al. 2022, section 4, the linear pacing function.
    """
    if step >= duration or start >= full:
        return full
    length = start + (full - start) * (step / duration)
    return min(full, max(start, int(length + 1e-6) // multiple * multiple))


def token_progress(
    total: int,
    duration: float,
    start: int,
    full: int,
    multiple: int = 8,
    mode: Literal["truncate", "reshape"] = "truncate",
) -> list[float]:
    """Share of a run's tokens that are through before each of its steps, and after the last: ``total + 1`` numbers.

    For a learning rate that decays by tokens and not by steps, as the authors'::

        done = token_progress(total, 0.3 * total, start=64, full=1024)
        LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * done[step])))

    Args:
        total: Optimizer steps of the run.
        duration, start, full, multiple, mode: As of :class:`LengthWarmup`, ``duration`` in optimizer steps.

    Source:
        Li et al. 2022, section 4: "token-wise" decay.
    """
    done = [0]
    for step in range(total):
        length = length_at(step, duration, start, full, multiple)
        if mode == "reshape":  # all rows of a sequence
            length = full - full % row_length(length, full)
        done.append(done[-1] + length)
    return [tokens / done[-1] for tokens in done]


class LengthWarmup(TechniqueCallback):
    """Train on short sequences first. Validation has them whole.

    Example::

        trainer = Trainer(max_steps=10_000, callbacks=[LengthWarmup(start=64)])

    Args:
        start: Tokens of a sequence at the first step. Sequences that are no longer stay as they are.
        duration: When the full length is reached: a share of the run, up to 1, a number of optimizer steps, or words,
            ``"3 epochs"``.
        multiple: Lengths are rounded down to a multiple of this. Each length is a graph for ``torch.compile``.
        mode: ``"truncate"``: a window of each sequence, so that a step sees fewer tokens and takes less time.
            ``"reshape"``: a sequence is split into even rows that are no longer, so that a step sees all tokens but
            fewer than one for each row, and only attention costs less. Their length need be no multiple.
        sequence: Names or places of what goes by token in a batch, such as ``["input_ids", "labels"]`` or ``[0, 1]``.
            By default the token ids and what is known to go with them.

    Raises:
        SequenceError: numbers that make no schedule; a batch without token ids; a step that fails on a part of a batch.
        LengthError: a share of a run of unknown length.
    """

    technique: ClassVar[Technique] = RECORD
    _until: Until | None = in_run(None)  # when the full length is reached; None from then on
    _length: int = in_run(0)
    _whole: Any = in_run(None)  # this batch as it came
    _left: list[str] = in_run(list)  # parts of this batch that are as long as its sequence and stay whole

    def __init__(
        self,
        start: int = 64,
        *,
        duration: float | str = 0.3,
        multiple: int = 8,
        mode: Literal["truncate", "reshape"] = "truncate",
        sequence: Sequence[str | int] | None = None,
    ) -> None:
        if start < 2 or multiple < 1:
            raise SequenceError(
                f"start={start}, multiple={multiple}: give 2 tokens or more, and a multiple of 1 or more."
            )
        if not isinstance(duration, str) and (duration <= 0 or (duration > 1 and duration != int(duration))):
            raise SequenceError(f"duration={duration}: give a share of the run between 0 and 1, or optimizer steps.")
        if mode not in ("truncate", "reshape"):
            raise SequenceError(f"mode={mode!r} is none of: truncate, reshape.")
        if isinstance(sequence, str) or (sequence is not None and not len(sequence)):
            raise SequenceError(
                f"sequence={sequence!r}: give a list of names or places, such as ['input_ids', 'labels']."
            )
        self.start, self.duration, self.multiple, self.mode = start, duration, multiple, mode
        self.sequence = sequence

    def check(self, run: Run) -> None:
        if run.fitting:
            self._until = run.until(self.duration, "duration")

    def alter_batch(self, run: Run, batch: Any) -> Any:
        if self._until is None:
            return batch
        self._length, self._left, self._whole = 0, [], None
        if self._until.reached:
            self._until = None  # from here on it costs nothing to ask
            return batch
        found = find_sequences(batch, self.sequence)
        length = length_at(self._until.done, 1, self.start, found.length, self.multiple)
        self._length = length if self.mode == "truncate" else row_length(length, found.length)
        if self._length == found.length:
            return batch
        self._left, self._whole = found.left, batch if found.left else None
        return (cut if self.mode == "truncate" else divide)(batch, found, length)

    def around_step(self, run: Run, call_next: Any, batch: Any, *args: Any) -> Any:
        if not self._left:
            return call_next(batch, *args)
        try:
            return call_next(batch, *args)
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, (EkeError, torch.OutOfMemoryError)) or fails_too(call_next, self._whole, *args):
                raise  # not of our making
            left, said = ", ".join(self._left), str(error).rstrip(".")
            raise SequenceError(
                f"The step failed on sequences of {self._length} tokens: {said}. LengthWarmup left {left} whole, "
                "which has as many entries but is not known to go by token. If it does, name all that do: "
                "LengthWarmup(sequence=['input_ids', 'labels', ...])."
            ) from error

    def step_kind(self) -> str:
        return f"length {self._length}" if self._length else "full length"

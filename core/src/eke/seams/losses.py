"""One loss for each sample, out of a ``training_step`` that returns their mean.

The tricks it hides: the mean is taken in the user's code. :func:`reduce_loss` is a line to write in its place; a plain
``cross_entropy`` is caught while the step runs, and only if it is beyond doubt what belongs to which sample. And what
the user logs is made of the same tensor that backward starts from: where samples are weighted or chosen, it shows the
plain mean and has the other's gradient, so that a logged loss means what it meant without the technique.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from eke import compat
from eke.seams.batch import rows, tensors
from eke.spec import EkeError

if TYPE_CHECKING:
    from eke.run import Run

Weigh = Callable[[Tensor], Tensor | None]

_capture: ContextVar[Capture | None] = ContextVar("eke_capture", default=None)
_as_trained: ContextVar[bool] = ContextVar("eke_as_trained", default=False)


class LossError(EkeError, ValueError):
    """The losses of single samples are not to be had, or not without doubt."""


def reduce_loss(losses: Tensor, valid: Tensor | None = None) -> Tensor:
    """The mean of losses, as a technique weighs the samples; without one, the plain mean.

    Write it where ``training_step`` takes the mean::

        losses = F.cross_entropy(logits, classes, reduction="none")
        return eke.reduce_loss(losses)

    Args:
        losses: (batch,), or (batch, length) for one loss a token.
        valid: Of the same shape, bool or 0 and 1: which tokens count. All of them by default.

    Returns:
        A scalar. With every weight 1 it is the mean over all valid entries.

    Raises:
        LossError: another shape, or a number of samples that is not that of the batch.
    """
    if losses.ndim not in (1, 2) or (valid is not None and valid.shape != losses.shape):
        shape = f"{tuple(losses.shape)}{'' if valid is None else f' with valid {tuple(valid.shape)}'}"
        raise LossError(f"reduce_loss got losses of shape {shape}. Give (batch,) or (batch, length), and valid alike.")
    valid = torch.ones_like(losses) if valid is None else valid.to(losses.dtype)
    active = _capture.get()
    if active is None:
        return (losses * valid).sum() / valid.sum().clamp(min=1)
    return active.reduce(losses, valid, "eke.reduce_loss")


class Capture:
    """What one ``training_step`` gave. The mean that the step gets shows the plain mean, and has the weighted gradient.

    Args:
        samples: In the batch.
        weigh: Each sample's loss, (batch,), float32 and without graph, to its weight, or to None for all alike.
        batch: What the step trains on: tokens that were flattened are found in it again.
        shows: A scalar to show in place of the plain mean of these samples, such as that of all they were chosen from.
        known: The same step gave the losses of all samples that these were chosen from, one behind the other.
    """

    def __init__(
        self, samples: int, weigh: Weigh, batch: Any = None, shows: Tensor | None = None, known: bool = False
    ) -> None:
        self.samples, self.weigh, self.batch, self.shows, self.known = samples, weigh, batch, shows, known
        self.mean: Tensor | None = None  # plain, without graph
        self.weighted: Tensor | None = None  # what the gradient is of, without graph
        self.losses: Tensor | None = None  # (batch,), float32
        self.valid: Tensor | None = None  # (batch,) or (batch, length): what counts, 0 or 1
        self.source = ""
        self.logits: Tensor | None = None  # of a plain cross entropy: (batch, classes, ...), without graph
        self.target: Tensor | None = None
        self.smoothing = 0.0  # of its labels

    def reduce(self, losses: Tensor, valid: Tensor, source: str) -> Tensor:
        """The weighted mean. ``losses`` and ``valid`` are (batch,) or (batch, length)."""
        if self.losses is not None:
            raise LossError(
                f"training_step takes the mean of losses twice, by {self.source} and by {source}: which is to be "
                "weighed is not known. Use eke.reduce_loss once, and reduction='none' for the others."
            )
        if len(losses) != self.samples:
            raise LossError(
                f"{source} gave {len(losses)} losses for a batch of {self.samples} samples. Give one loss "
                "for each sample, in the order of the batch."
            )
        self.source, self.valid = source, valid.detach()
        count = valid.flatten(1).sum(1) if valid.ndim > 1 else valid
        summed = (losses * valid).flatten(1).sum(1) if losses.ndim > 1 else losses * valid
        self.losses = (summed.detach().float() / count.float().clamp(min=1)).cpu()
        weights, total = self.weigh(self.losses), count.sum().clamp(min=1)
        mean = summed.sum() / total
        weighted = mean if weights is None else (summed * weights.to(summed)).sum() / total
        self.mean, self.weighted = mean.detach(), weighted.detach()
        if weights is None and self.shows is None:
            return mean
        return show(weighted, self.mean if self.shows is None else self.shows)

    def check(self) -> Tensor:
        """The losses.

        Raises:
            LossError: none was captured.
        """
        if self.losses is None:
            raise LossError(
                "training_step took no mean of losses that could be followed back to the samples: neither "
                "eke.reduce_loss(losses), nor one cross_entropy with reduction='mean' outside of compiled code. Write "
                "return eke.reduce_loss(losses), with one loss for each sample."
            )
        return self.losses

    def cross_entropy(self, func: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
        """A call of ``cross_entropy``, its arguments by name."""
        reduction = given.get("reduction", "mean")
        if reduction == "none":
            return func(**given)
        weight = given.get("weight")
        if reduction != "mean" or weight is not None or given.get("reduce") is not None or given.get("size_average"):
            raise LossError(
                f"training_step calls cross_entropy with reduction={reduction!r}"
                f"{' and weights of classes' if weight is not None else ''}, whose samples are not told apart. Take "
                "reduction='none' and return eke.reduce_loss(losses)."
            )
        target = given["target"]
        if not self.known:
            self._refuse_contrast(given["input"], target)
        losses = func(**{**given, "reduction": "none"})
        ignored = given.get("ignore_index", -100)
        valid = torch.ones_like(losses)
        if not target.is_floating_point():  # classes, and not their probabilities
            valid = (target != ignored).to(losses.dtype)
        rows = self._rows(losses, target, ignored)
        self.logits, self.target = given["input"].detach(), target
        self.smoothing = given.get("label_smoothing", 0.0)
        return self.reduce(losses.reshape(rows), valid.reshape(rows), "cross_entropy")

    def _refuse_contrast(self, logits: Tensor, target: Tensor) -> None:
        """Each sample is the class of itself: a contrastive loss, which other samples of the batch make."""
        # Of few classes a batch may hold each once, in order, by chance.
        square = logits.ndim == 2 and logits.shape[0] == logits.shape[1] == self.samples >= 8
        if square and torch.equal(target, torch.arange(len(logits), device=target.device)):
            raise LossError(
                "training_step compares each sample of the batch with every other, a contrastive loss: it is not the "
                "mean of losses that belong to single samples, so samples cannot be weighed or chosen by it. If these "
                "are classes after all, take reduction='none' and return eke.reduce_loss(losses)."
            )

    def _rows(self, losses: Tensor, target: Tensor, ignored: int) -> tuple[int, ...]:
        """Shape of the losses by sample. Tokens may have been flattened, which a view or the batch shows; views of
        images that were put one behind the other look the same in number only."""
        samples, base = self.samples, target._base
        if losses.ndim and len(losses) == samples:
            return (samples,) if losses.numel() == samples else (samples, -1)
        if samples == 1:
            return (1, -1)  # whatever it is, it belongs to the one
        if losses.ndim == 1 and losses.numel() == target.numel() and target.numel() % samples == 0:
            whole = base is not None and base.ndim == 2 and base.numel() == target.numel()
            known = self.known or (whole and base.shape[0] == samples)
            if known or flattened_rows(target, samples, self.batch, ignored):
                return (samples, -1)
        raise LossError(
            f"cross_entropy got targets of shape {tuple(target.shape)} in a step on {samples} samples: which loss "
            "belongs to which sample is not known. Take reduction='none' and return eke.reduce_loss(losses)."
        )


class Shown(Capture):
    """Of a step whose samples were chosen before it: its first mean of losses shows another value, and nothing is
    refused that the step may do.

    Attributes:
        mean: The mean that the step took itself, None where it took none.
    """

    def __init__(self, value: Tensor) -> None:
        super().__init__(0, lambda losses: None, shows=value)

    def reduce(self, losses: Tensor, valid: Tensor, source: str) -> Tensor:
        return self._first((losses * valid).sum() / valid.sum().clamp(min=1))

    def cross_entropy(self, func: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
        loss = func(**given)
        return loss if loss.ndim or given.get("reduction", "mean") != "mean" else self._first(loss)

    def _first(self, mean: Tensor) -> Tensor:
        if self.mean is not None:
            return mean
        self.mean = mean.detach()
        return show(mean, self.shows)


def show(loss: Tensor, value: Tensor) -> Tensor:
    """A scalar with the value of ``value`` and the gradient of ``loss``."""
    return loss if _as_trained.get() else _Show.apply(loss, value.to(loss))


@contextmanager
def as_trained() -> Iterator[None]:
    """Inside, a loss has the value that it is trained on, whatever it would show: for who measures losses."""
    token = _as_trained.set(True)
    try:
        yield
    finally:
        _as_trained.reset(token)


class _Show(torch.autograd.Function):
    @staticmethod
    def forward(loss: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@contextmanager
def capture(
    samples: int, weigh: Weigh, batch: Any = None, *, shows: Tensor | None = None, known: bool = False
) -> Iterator[Capture]:
    """Capture and weigh the losses of the samples of one step inside. Arguments as of :class:`Capture`."""
    with _caught(Capture(samples, weigh, batch, shows, known)) as captured:
        yield captured


@contextmanager
def showing(value: Tensor) -> Iterator[Shown]:
    """Let the first mean of losses inside show ``value``, such as the mean over the batch of which a step trains on a
    part, and keep its own gradient."""
    with _caught(Shown(value)) as shown:
        yield shown


def on_chosen(run: Run, call_next: Callable[..., Any], batch: Any, chosen: Tensor, mean: Tensor, *args: Any) -> Any:
    """``training_step`` on some samples of a batch. What it logs of its loss shows the mean of the whole batch; that of
    the chosen ones is logged as ``chosen_loss``.

    Args:
        chosen: Numbers of the samples, (chosen,), int64.
        mean: Of all losses of the batch, a scalar.
    """
    with showing(mean) as shown:
        output = call_next(rows(batch, chosen), *args)
    if shown.mean is not None:
        run.log("chosen_loss", shown.mean)
    return output


@contextmanager
def _caught(captured: Capture) -> Iterator[Any]:
    token = _capture.set(captured)
    try:
        with _CrossEntropy(captured):
            yield captured
    finally:
        _capture.reset(token)


class _CrossEntropy(TorchFunctionMode):
    """Takes the mean of a plain cross entropy itself."""

    def __init__(self, captured: Capture) -> None:
        super().__init__()
        self.captured = captured

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.cross_entropy:
            return func(*args, **(kwargs or {}))
        names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
        return self.captured.cross_entropy(func, {**dict(zip(names, args, strict=False)), **(kwargs or {})})


def flattened_rows(target: Tensor, samples: int, batch: Any, ignored: int = -100) -> bool:
    """Whether flat targets are one sample's tokens after the other's, beyond doubt.

    They are if they agree, but for those ignored, with the first or the last tokens of each row of a tensor of the
    batch, and would not if they were read column by column; or if that comes to the same, because all that count
    belong to one sample either way.

    Args:
        target: (samples * length,), integer.
        samples: In the batch.
        batch: As the step got it.
        ignored: The class that does not count.
    """
    by_row, by_column = target.reshape(samples, -1), target.reshape(-1, samples).T
    length = by_row.shape[1]
    place = torch.arange(target.numel(), device=target.device)
    if not compat.has_values(target):  # a dry run, which asks for sizes
        return True
    if bool(((place // length == place % samples) | (target == ignored)).all()):
        return True

    def agrees(read: Tensor, tokens: Tensor) -> bool:
        ends = (tokens[:, :length], tokens[:, -length:])
        return any(bool(((read == end) | (read == ignored)).all()) for end in ends)

    for tokens in tensors(batch):
        integer = not tokens.is_floating_point() and tokens.device == target.device
        if integer and tokens.ndim == 2 and len(tokens) == samples and tokens.shape[1] >= length > 1:
            if agrees(by_row, tokens):
                return not agrees(by_column, tokens)
    return False

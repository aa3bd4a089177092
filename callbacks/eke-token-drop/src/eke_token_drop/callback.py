"""Patch dropout: a Vision Transformer trains on a random part of its patches, and on all of them at the end.

Sources: Li, Fan, Hu, Feichtenhofer, He, "Scaling Language-Image Pre-training via Masking" (FLIP), CVPR 2023,
https://arxiv.org/abs/2212.00794, section 3; Liu, Matsoukas, Strand, Azizpour, Smith, "PatchDropout: Economizing Vision
Transformers Using Patch Dropout", WACV 2023, https://arxiv.org/abs/2208.07220. Survey section 2.2, reference [56].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from eke import EkeError, Run, Technique, TechniqueCallback, in_run
from eke.seams import interceptor
from eke.seams.batch import tensors
from eke.seams.patches import PatchesError, find_patches, patch_blocks, relative_positions
from eke.seams.step import fails_too
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from eke_token_drop.entry import RECORD


def keep_at(progress: float, drop: float, tail: float, schedule: str) -> float:
    """Share of the patches that stay when this share of the run is done: all of them in the last ``tail``.

    Before, ``1 - drop`` throughout (``"constant"``), or on a line from there to all (``"linear"``).

    Source:
        Li et al. 2023, section 3: a constant share, then a short phase without masking.
    """
    if progress >= 1 - tail:
        return 1.0
    return 1 - drop if schedule == "constant" else 1 - drop * (1 - progress / (1 - tail))


def choose(batch: int, patches: int, count: int, prefix: int, seed: int, device: torch.device) -> Tensor:
    """Positions that stay, (batch, prefix + count), int64, rising: all of the prefix, and ``count`` patches of each
    sample, drawn without replacement. They follow from ``seed`` alone."""
    numbers = torch.Generator(device).manual_seed(seed)
    order = torch.rand(batch, patches, generator=numbers, device=device).argsort(1)[:, :count].sort(1).values
    return torch.cat([torch.arange(prefix, device=device).expand(batch, -1), order + prefix], dim=1)


class TokenDropError(EkeError, MisconfigurationException, ValueError, RuntimeError):
    """An argument, a model or a run with which patches cannot be left out."""


_ON_TEXTS = "TokenDrop leaves out patches of images. On texts, eke-random-ltd leaves tokens out of the middle blocks."


class TokenDrop(TechniqueCallback):
    """Leave out patches after the position embedding, anew for each sample, while training. Validation sees all.

    Example::

        trainer = Trainer(max_epochs=90, callbacks=[TokenDrop(drop=0.5)])

        # FLIP: the image tower of a model with two, as in contrastive training
        trainer = Trainer(callbacks=[TokenDrop(drop=0.5, tail=0.02)])

    Args:
        drop: Share of the patches that is left out. Class and register tokens stay.
        tail: Share of the run, at its end, that sees all patches ("unmasked tuning").
        schedule: ``"constant"``, or ``"linear"``: the share falls to 0 at the beginning of the tail.
        prefix: Tokens of the model's own in front of the patches, such as a class token. By default the difference
            between its tokens and the patches that its convolution cuts.
        blocks: Dotted paths of lists of blocks, one or several. By default those that see images: of an image and a
            text tower, the image's.

    Raises:
        TokenDropError: shares outside their range; no patch embedding, without ``prefix``; a model of texts; relative
            positions; a run of unknown length with a tail; a model that fails on fewer tokens.
    """

    technique: ClassVar[Technique] = RECORD
    _entrances: list[Entrance] = in_run(list)
    _leave: list[LeaveOut] = in_run(list)  # of this batch, one for each entrance

    def __init__(
        self,
        drop: float = 0.5,
        *,
        tail: float = 0.1,
        schedule: Literal["constant", "linear"] = "constant",
        prefix: int | None = None,
        blocks: str | Sequence[str] | None = None,
    ) -> None:
        if not 0 <= drop < 1 or not 0 <= tail <= 1:
            raise TokenDropError(f"drop={drop}, tail={tail}: give a share of the patches below 1, and one of the run.")
        if schedule not in ("constant", "linear"):
            raise TokenDropError(f"schedule={schedule!r} is none of: constant, linear.")
        if prefix is not None and prefix < 0:
            raise TokenDropError(f"prefix={prefix}: give 0 or more tokens.")
        self.drop, self.tail, self.schedule, self.prefix, self.blocks = drop, tail, schedule, prefix, blocks

    def check(self, run: Run) -> None:
        if run.fitting and (self.tail > 0 or self.schedule == "linear"):
            run.until(1.0)  # the schedule goes by the length of the run

    def alter_model(self, run: Run) -> None:
        pl_module = run.module
        for found in patch_blocks(pl_module, self.blocks, self.prefix, "TokenDrop", _ON_TEXTS):
            if pairs := relative_positions(found.container):
                raise TokenDropError(
                    f"The blocks at {found.path!r} hold relative positions ({pairs[0]}), for all tokens in their "
                    "places: patches cannot be left out. TokenDrop serves blocks without, such as ViT's."
                )
            entrance = Entrance(run.blocks([found], slice(1)))
            if self.prefix is None:
                try:
                    embedding = find_patches(pl_module, found.path)
                except PatchesError as error:
                    raise PatchesError(
                        f"{error} Say how many tokens precede the patches: TokenDrop(prefix=1)."
                    ) from None
                # The convolution tells, batch by batch, how many there are.
                run.at_end(embedding.module.register_forward_hook(partial(_count, entrance.cut)).remove)
            self._entrances.append(entrance)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        keep = keep_at(self.progress.share, self.drop, self.tail, self.schedule)
        self._leave = []
        if keep == 1:
            return
        if self.prefix is not None and not any(one.is_floating_point() and one.ndim > 2 for one in tensors(batch)):
            shapes = ", ".join(str(tuple(one.shape)) for one in tensors(batch))
            raise TokenDropError(f"The batch holds no images but tensors of {shapes or 'no shape'}. {_ON_TEXTS}")
        seed = self.run.seed(per_rank=True)
        for number, one in enumerate(self._entrances):
            leave = LeaveOut(keep, seed + 1024 * number, self.prefix, one.cut)
            one.first.put(one.first.now()[0], leave)
            self._leave.append(leave)

    def around_step(self, run: Run, call_next: Any, batch: Any, *args: Any) -> Any:
        if not self._leave:
            return call_next(batch, *args)
        try:
            return call_next(batch, *args)
        except RuntimeError as error:
            left = any(leave.left for leave in self._leave)
            self._clear()
            if not left or isinstance(error, (EkeError, torch.OutOfMemoryError)) or fails_too(call_next, batch, *args):
                raise  # not of our making
            said = str(error).rstrip(".")
            raise TokenDropError(
                f"The model failed on a part of its patches: {said}. What follows the first block has to take any "
                "number of tokens: a head on the class token or on their mean, no head for each place, no windows."
            ) from error

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._leave:
            self._clear()

    def _clear(self) -> None:
        """All patches pass again."""
        for one in self._entrances:
            one.first.clear()

    def step_kind(self) -> str:
        return f"{self._leave[0].left} patches" if self._leave else "all patches"


class Entrance:
    """The first block of a list, whichever it is at the moment, and how many patches come to it."""

    def __init__(self, first: interceptor.InterceptedBlocks) -> None:
        self.first = first
        self.cut: dict[str, int] = {}  # patches that the convolution has made in this batch


class LeaveOut:
    """At the entrance of the first block: lets some patches in. All blocks behind it see no others."""

    priority = -1  # outside an action that skips the first block

    def __init__(self, keep: float, seed: int, prefix: int | None, cut: dict[str, int]) -> None:
        self.keep, self.seed, self.prefix, self.cut = keep, seed, prefix, cut
        self.left = 0  # patches that were let in

    def __call__(self, call_next: Any, hidden: Tensor, args: Any, kwargs: Any, form: interceptor.Form) -> Any:
        if hidden.ndim != 3:
            raise TokenDropError(
                f"TokenDrop met hidden states of shape {tuple(hidden.shape)} and needs (batch, length, width): blocks "
                "that work on windows or images cannot leave patches out."
            )
        length = hidden.shape[1]
        prefix = length - self.cut["patches"] if self.prefix is None else self.prefix
        if not 0 <= prefix < length:
            raise TokenDropError(
                f"The first block gets {length} tokens, and the model cuts {self.cut.get('patches')} patches: they "
                f"cannot be told from its own tokens. Say how many of those come first: TokenDrop(prefix=1)."
            )
        for name, value in [*((f"argument {i}", one) for i, one in enumerate(args, 1)), *kwargs.items()]:
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(part, Tensor) and {length, length - prefix} & set(part.shape):
                    raise TokenDropError(
                        f"The blocks also get {name} of shape {tuple(part.shape)}, one entry a token, such as rotary "
                        "positions or a mask. TokenDrop serves models that add their positions before the blocks."
                    )
        self.left = max(1, round((length - prefix) * self.keep))
        positions = choose(len(hidden), length - prefix, self.left, prefix, self.seed, hidden.device)
        return call_next(interceptor.gather_tokens(hidden, positions), args, kwargs)


def _count(cut: dict[str, int], module: Any, args: Any, output: Tensor) -> None:
    cut["patches"] = output.shape[2:].numel()  # (batch, width, rows, columns)

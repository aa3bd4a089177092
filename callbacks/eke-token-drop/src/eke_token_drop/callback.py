"""Patch dropout: a Vision Transformer trains on a random part of its patches, and on all of them at the end.

Sources: Li, Fan, Hu, Feichtenhofer, He, "Scaling Language-Image Pre-training via Masking" (FLIP), CVPR 2023,
https://arxiv.org/abs/2212.00794, section 3; Liu, Matsoukas, Strand, Azizpour, Smith, "PatchDropout: Economizing Vision
Transformers Using Patch Dropout", WACV 2023, https://arxiv.org/abs/2208.07220. Survey section 2.2, reference [56].
"""

from __future__ import annotations

from functools import partial
from math import isfinite
from typing import Any, ClassVar, Literal

import torch
from eke import Run, Technique, TechniqueCallback
from eke.seams import interceptor
from eke.seams.blocks import Blocks, find_blocks
from eke.seams.patches import PatchesError, find_patches, relative_positions
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


class TokenDrop(TechniqueCallback):
    """Leave out patches after the position embedding, anew for each sample, while training. Validation sees all.

    Example::

        trainer = Trainer(max_epochs=90, callbacks=[TokenDrop(drop=0.5)])

        # FLIP: the image tower of a model with two, as in contrastive training
        trainer = Trainer(callbacks=[TokenDrop(drop=0.5, tail=0.02, blocks="clip.vision_model.encoder.layers")])

    Args:
        drop: Share of the patches that is left out. Class and register tokens stay.
        tail: Share of the run, at its end, that sees all patches ("unmasked tuning").
        schedule: ``"constant"``, or ``"linear"``: the share falls to 0 at the beginning of the tail.
        prefix: Tokens of the model's own in front of the patches, such as a class token. By default the difference
            between its tokens and the patches that its convolution cuts.
        blocks: Dotted path of the list of blocks. Needed where a model has more than one, as one with two towers.

    Raises:
        ValueError: shares outside their range; no patch embedding, without ``prefix``; relative positions.
        MisconfigurationException: a run of unknown length with a tail; a model that fails on fewer tokens.
    """

    technique: ClassVar[Technique] = RECORD

    def __init__(
        self,
        drop: float = 0.5,
        *,
        tail: float = 0.1,
        schedule: Literal["constant", "linear"] = "constant",
        prefix: int | None = None,
        blocks: str | None = None,
    ) -> None:
        if not 0 <= drop < 1 or not 0 <= tail <= 1:
            raise ValueError(f"drop={drop}, tail={tail}: give a share of the patches below 1, and one of the run.")
        if schedule not in ("constant", "linear"):
            raise ValueError(f"schedule={schedule!r} is none of: constant, linear.")
        if prefix is not None and prefix < 0:
            raise ValueError(f"prefix={prefix}: give 0 or more tokens.")
        self.drop, self.tail, self.schedule, self.prefix, self.blocks = drop, tail, schedule, prefix, blocks
        self._found: Blocks | None = None
        self._first: Any = None
        self._hook: Any = None
        self._cut: dict[str, int] = {}  # patches that the convolution has made in this batch
        self._rank = 0
        self._total = float("inf")
        self._leave: LeaveOut | None = None

    def alter_model(self, run: Run) -> None:
        pl_module = run.module
        self._found = find_blocks(pl_module, self.blocks)
        if pairs := relative_positions(self._found.container):
            raise ValueError(
                f"The blocks at {self._found.path!r} hold relative positions ({pairs[0]}), for all tokens in their "
                "places: patches cannot be left out. TokenDrop serves blocks without, such as ViT's."
            )
        if self.prefix is None and self._hook is None:
            try:
                embedding = find_patches(pl_module, self.blocks)
            except PatchesError as error:
                raise PatchesError(f"{error} Say how many tokens precede the patches: TokenDrop(prefix=1).") from None
            self._hook = embedding.module.register_forward_hook(partial(_count, self._cut))

    def end_run(self, run: Run) -> None:
        if self._first is not None:
            interceptor.detach([self._first], RECORD.name)
        if self._hook is not None:
            self._hook.remove()
        self._first = self._hook = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rank, self._total = trainer.global_rank, trainer.estimated_stepping_batches
        if not isfinite(self._total) and (self.tail > 0 or self.schedule == "linear"):
            raise MisconfigurationException(
                f"TokenDrop(tail={self.tail}, schedule={self.schedule!r}) goes by the length of the run, which is not "
                "known. Give Trainer(max_steps=...), or tail=0 with the constant schedule."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        keep = keep_at(self.progress.steps / self._total, self.drop, self.tail, self.schedule)
        self._leave = None
        if keep == 1:
            return
        seed = int(torch.randint(2**40, (), generator=self.generator)) * 4096 + self._rank
        self._leave = LeaveOut(keep, seed, self.prefix, self._cut)
        interceptor.put(self._entrance(), RECORD.name, self._leave)

    def around_step(self, run: Run, call_next: Any, batch: Any, *args: Any) -> Any:
        if self._leave is None:
            return call_next(batch, *args)
        try:
            return call_next(batch, *args)
        except RuntimeError as error:
            if not self._leave.left or isinstance(error, torch.OutOfMemoryError):  # not of our making
                raise
            raise MisconfigurationException(
                f"The model failed on a part of its patches: {error}. What follows the first block has to take any "
                "number of tokens: a head on the class token or on their mean, no head for each place, no windows."
            ) from error

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._leave is not None:
            interceptor.put(self._first, RECORD.name)

    def step_kind(self) -> str:
        return f"{self._leave.left} patches" if self._leave is not None else "all patches"

    def __getstate__(self) -> dict[str, Any]:  # a copy meets its model anew
        return {**super().__getstate__(), "_found": None, "_first": None, "_hook": None, "_leave": None}

    def _entrance(self) -> Any:
        """The first block of the moment: another technique may have put one in front."""
        now = next(iter(self._found.container))
        if now is not self._first:
            if self._first is not None:
                interceptor.detach([self._first], RECORD.name)
            interceptor.attach([now], RECORD.name)
            self._first = now
        return now


class LeaveOut:
    """At the entrance of the first block: lets some patches in. All blocks behind it see no others."""

    priority = -1  # outside an action that skips the first block

    def __init__(self, keep: float, seed: int, prefix: int | None, cut: dict[str, int]) -> None:
        self.keep, self.seed, self.prefix, self.cut = keep, seed, prefix, cut
        self.left = 0  # patches that were let in

    def __call__(self, call_next: Any, hidden: Tensor, args: Any, kwargs: Any, form: interceptor.Form) -> Any:
        if hidden.ndim != 3:
            raise RuntimeError(
                f"TokenDrop met hidden states of shape {tuple(hidden.shape)} and needs (batch, length, width): blocks "
                "that work on windows or images cannot leave patches out."
            )
        length = hidden.shape[1]
        prefix = length - self.cut["patches"] if self.prefix is None else self.prefix
        if not 0 <= prefix < length:
            raise RuntimeError(
                f"The first block gets {length} tokens, and the model cuts {self.cut.get('patches')} patches: they "
                f"cannot be told from its own tokens. Say how many of those come first: TokenDrop(prefix=1)."
            )
        for name, value in [*((f"argument {i}", one) for i, one in enumerate(args, 1)), *kwargs.items()]:
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(part, Tensor) and {length, length - prefix} & set(part.shape):
                    raise RuntimeError(
                        f"The blocks also get {name} of shape {tuple(part.shape)}, one entry a token, such as rotary "
                        "positions or a mask. TokenDrop serves models that add their positions before the blocks."
                    )
        self.left = max(1, round((length - prefix) * self.keep))
        positions = choose(len(hidden), length - prefix, self.left, prefix, self.seed, hidden.device)
        return call_next(interceptor.gather_tokens(hidden, positions), args, kwargs)


def _count(cut: dict[str, int], module: Any, args: Any, output: Tensor) -> None:
    cut["patches"] = output.shape[2:].numel()  # (batch, width, rows, columns)

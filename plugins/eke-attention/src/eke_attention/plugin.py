"""Attention of any model by another kernel, or on fewer pairs of tokens.

Sources stand at the kernels and patterns. Survey section 4.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from eke import ArgumentError, Run, Technique, TechniqueCallback, in_run
from eke.seams.names import NamesError, match
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from eke_attention.entry import RECORD
from eke_attention.kernels import (
    FLEX_BLOCK,
    KERNELS,
    AttentionError,
    BlockPattern,
    Call,
    block_pattern,
    flex,
    gathered,
    grid,
    refusal,
    sdpa,
)
from eke_attention.patterns import Documents, Pattern, Predicted
from eke_attention.sites import Site, install

SPARSE = ("gather", "flex", "masked")


class Attention(TechniqueCallback):
    """Compute a model's attention by one kernel, and where a pattern is given, on its pairs alone.

    Example::

        trainer = Trainer(callbacks=[Attention()])
        trainer = Trainer(callbacks=[Attention(SlidingWindow(256))])

    Args:
        pattern: Which pairs of tokens meet: a :class:`~eke_attention.SlidingWindow`, :class:`~eke_attention.Prefix`,
            :class:`~eke_attention.Documents`, or a prediction. None lets all meet that the model lets meet.
        kernel: ``"auto"``, or without a pattern one of ``"sdpa"``, ``"flash"``, ``"cudnn"``, ``"flash-attn"``,
            ``"naive"``, and with one of ``"gather"``, ``"flex"``, ``"masked"``.
        layers: Patterns of dotted names of attention modules. All by default.

    Raises:
        ValueError: a kernel that is none of these, or that does not go with the pattern.
        AttentionError: a kernel that cannot run on the device; no attention that can be replaced, or one of
            ``layers`` that cannot.
        NamesError: a pattern of ``layers`` that meets no attention.
    """

    technique: ClassVar[Technique] = RECORD
    may_change = ("kernel",)
    _sites: list[Site] = in_run(list)
    _others: list[Site] = in_run(list)  # which are not among layers
    _fixed: dict[tuple[Any, ...], BlockPattern] = in_run(dict)
    _training: bool = in_run(False)
    _steps: int = in_run(0)

    def __init__(
        self, pattern: Pattern | None = None, kernel: str = "auto", *, layers: list[str] | None = None
    ) -> None:
        able = tuple(KERNELS) if pattern is None else SPARSE
        if kernel not in ("auto", *able):
            raise ArgumentError(
                f"kernel={kernel!r} {'with' if pattern is not None else 'without'} a pattern: give 'auto' or one of "
                f"{', '.join(able)}."
            )
        self.pattern, self.kernel, self.layers = pattern, kernel, layers
        self._kept: dict[str, dict[str, Any]] = {}  # what patterns know, before training and after it
        self._used, self._why = "", ""

    def check(self, run: Run) -> None:
        if why := refusal(self.kernel, run.device):
            raise AttentionError(f"Attention(kernel={self.kernel!r}) cannot run here: {why}. Take kernel='auto'.")
        self._used, self._why = self._choose(run.device)
        if run.fitting:
            self._kept = {}  # a new run; one that goes on gets its own back after this

    def on_this_machine(self) -> str:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if why := refusal(self.kernel, device):
            raise AttentionError(f"Attention(kernel={self.kernel!r}) cannot run here: {why}. Take kernel='auto'.")
        return "by kernel {} ({})".format(*self._choose(device))

    def _choose(self, device: torch.device) -> tuple[str, str]:
        if self.kernel != "auto":
            return self.kernel, "as demanded"
        if self.pattern is None:
            return "sdpa", f"torch takes its best kernel on the {device.type.upper()}"
        if isinstance(self.pattern, Predicted):
            return "masked", "pairs are predicted one by one, and seldom leave whole blocks out"
        if device.type == "cuda" and self.pattern.fixed:
            return "flex", "blocks are fixed, on a GPU"
        return "gather", "FlexAttention has no backward on a CPU" if device.type == "cpu" else "blocks change by batch"

    def alter_model(self, run: Run) -> None:
        pl_module = run.module
        sites, left = install(pl_module, self._attend)
        wanted = [site.path for site in sites]
        if self.layers is not None and (sites or left):
            try:
                wanted = match([*wanted, *left], self.layers, "layers")
            except NamesError:
                self._remove(sites)
                raise
            if missed := [path for path in left if path in wanted]:
                self._remove(sites)
                raise AttentionError(f"The attention at {missed[0]!r} cannot be replaced: {left[missed[0]]}.")
        self._sites = [site for site in sites if site.path in wanted]
        self._others = [site for site in sites if site.path not in wanted]
        for site in self._others:
            site.attend = _as_it_was
        if not self._sites:
            self._remove(sites)
            told = "; ".join(f"{path}: {why}" for path, why in left.items())
            raise AttentionError(
                f"{type(pl_module).__name__} has no attention that {'can be replaced' if left else 'could be found'}"
                f"{'. ' if left else ''}{told}. Leave Attention out of this run."
            )
        for site in self._sites:
            site.wants_input = self.pattern is not None and self.pattern.wants_input
        ways = ", ".join(sorted({site.how for site in self._sites}))
        text = f"Attention: {len(self._sites)} modules ({ways}), kernel {self._used} ({self._why})"
        text += f", pattern {self.pattern}." if self.pattern is not None else "."
        if left:
            text += f" Left as they are: {'; '.join(f'{path}: {why}' for path, why in left.items())}."
        rank_zero_info(text)

    @staticmethod
    def _remove(sites: list[Site]) -> None:
        for site in sites:
            site.remove()

    def end_run(self, run: Run) -> None:
        if self._sites:
            self._kept = self._memory()
            self._remove([*self._sites, *self._others])

    # ------------------------------------------------------------------ a step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps = self.progress.steps
        for site in self._sites:
            site.layer.update(self._kept.get(site.path, {}))

    def alter_batch(self, run: Run, batch: Any) -> Any:
        self._training = True
        return batch if self.pattern is None else self.pattern.see_batch(batch)

    def alter_eval_batch(self, run: Run, batch: Any) -> Any:
        self._training = False
        return batch if self.pattern is None else self.pattern.see_batch(batch)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(self.pattern, Documents):
            raise AttentionError("Documents does not see the batches of a prediction. Leave Attention out of it.")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.pattern is not None and self.progress.steps > self._steps:
            self._steps = self.progress.steps
            self.pattern.after_step({site.path: site.layer for site in self._sites}, self._steps, self._mean)

    def _mean(self, tensor: Tensor) -> Tensor:
        if self.run.world_size == 1:
            return tensor
        return self.run.trainer.strategy.reduce(tensor.to(self.run.device), reduce_op="mean")

    def _attend(self, site: Site, call: Call) -> Tensor:
        if self.pattern is None:
            return KERNELS[self._used](call)
        training = self._training and torch.is_grad_enabled()
        call = self.pattern.transform(call, site.layer, training)
        if self._used == "masked":
            # Not for a pattern that lets all meet: then there is nothing to mask.
            mod = self.pattern.mod(call, site.layer, training)
            if mod is None:
                return sdpa(call)
            return sdpa(_masked(call, mod))
        pattern = self._blocks(site, call, training)
        if pattern is None:
            return sdpa(call)
        return (flex if self._used == "flex" else gathered)(call, pattern)

    def _blocks(self, site: Site, call: Call, training: bool) -> BlockPattern | None:
        batch, heads, queries, _ = call.query.shape
        keys, device = call.key.shape[2], call.query.device
        known = queries, keys, call.causal, device
        if self.pattern.fixed and known in self._fixed:
            return self._fixed[known]
        mod = self.pattern.mod(call, site.layer, training)
        if mod is None:
            return None
        if call.causal:
            whole, mod = mod, lambda b, h, q, k: whole(b, h, q, k) & (k <= q)
        sizes = (1, 1) if self.pattern.fixed else (batch, heads if self.pattern.per_head else 1)
        size = self.pattern.block
        if self._used == "flex":
            size = math.ceil(size / FLEX_BLOCK) * FLEX_BLOCK
        found = block_pattern(mod, *sizes, queries, keys, size, device)
        if self.pattern.fixed:
            self._fixed[known] = found
        return found

    # ------------------------------------------------------------------ checkpoints

    def _memory(self) -> dict[str, dict[str, Any]]:
        """Of each layer that has some."""
        passing = ("input", "gradient", "now", "leaf", "new", "new query", "new key")  # of one step alone
        known = {
            site.path: {name: value for name, value in site.layer.items() if name not in passing}
            for site in self._sites
        }
        return {path: one for path, one in known.items() if one}

    def state_dict(self) -> dict[str, Any]:
        return {"layers": self._memory() or self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept = state["layers"]


def _masked(call: Call, mod: Any) -> Call:
    batch, heads, queries, _ = call.query.shape
    meet = grid(mod, batch, heads, queries, call.key.shape[2], call.query.device)
    if call.mask is None:
        return call._replace(mask=meet)
    if call.mask.dtype == torch.bool:
        return call._replace(mask=call.mask & meet)
    return call._replace(mask=call.mask.masked_fill(~meet, -torch.inf))


def _as_it_was(site: Site, call: Call) -> Tensor:
    return sdpa(call)

"""AdaLoRA: LoRA whose ranks stay where they matter. peft scores and masks; here is when, and how that resumes.

Source: Zhang, Chen, Bukharin, Karampatziakis, He, Cheng, Chen, Zhao 2023, https://arxiv.org/abs/2303.10512. Departures:
masks are put on after the optimizer's step, as peft does; the gradient of the regularizer that keeps the matrices
orthogonal is added once a step, before clipping, and the loss that is logged stays the model's own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from eke.seams.names import plain
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator
from torch import nn
from torch.optim import Optimizer

from eke_peft.errors import PEFTError
from eke_peft.library import UNTIL_KNOWN

_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class Ranks:
    """The budget of one adapter during one run.

    Args:
        host: The model that holds the adapter.
        config: peft's. Without ``total_step`` the run's steps count, the first tenth of which keeps all ranks
            (``tinit``) and the last three tenths the final ones (``tfinal``), where these are not given either.
        adapter: Its name.
    """

    def __init__(self, host: nn.Module, config: AdaLoraConfig, adapter: str) -> None:
        self.host, self.config, self.adapter = host, config, adapter
        self.allocator: RankAllocator | None = None
        self.steps, self.pattern = 0, {}
        self._scores: dict[str, dict[str, torch.Tensor]] = {}
        self._followed = False

    def begin(self, total: float) -> None:
        """Start, or go on with, a run of so many optimizer steps.

        Raises:
            PEFTError: the number of steps is not known, or leaves none to take ranks away in.
        """
        if self.config.total_step == UNTIL_KNOWN:
            if not math.isfinite(total):
                raise PEFTError("AdaLoRA needs the number of steps: give the Trainer max_steps, or total_step=.")
            self.config.total_step = int(total)
            if not self.config.tinit and not self.config.tfinal:
                self.config.tinit, self.config.tfinal = int(total) // 10, 3 * int(total) // 10
        if self.config.tinit >= self.config.total_step - self.config.tfinal:
            raise PEFTError(
                f"AdaLoRA with tinit={self.config.tinit} and tfinal={self.config.tfinal} has no step left of "
                f"{self.config.total_step} to take ranks away in."
            )
        self.allocator = Allocator(self.host, self.config, self.adapter)
        for name, parameter in self._parameters():
            for kind in _SCORES:
                if (known := self._scores.get(kind, {}).get(plain(name))) is not None:
                    getattr(self.allocator, kind)[name] = known.to(parameter.device)

    def follow(self, optimizer: Optimizer) -> None:
        """Score and mask after each step of the run's one optimizer.

        Raises:
            PEFTError: of several.
        """
        if self._followed:
            raise PEFTError(
                "AdaLoRA takes ranks away by the steps of one optimizer, and configure_optimizers gives several. Give "
                "one, or another method, such as PEFT('lora')."
            )
        self._followed = True
        optimizer.register_step_post_hook(self.step)

    def regularize(self) -> None:
        """Add the gradient of how far the matrices are from orthogonal, in the mean over them."""
        matrices = [(name, p) for name, p in self._parameters() if "lora_E" not in name and p.grad is not None]
        with torch.enable_grad():
            products = [p @ p.T if "lora_A" in name else p.T @ p for name, p in matrices]
            apart = [torch.norm(one - torch.eye(len(one), dtype=one.dtype, device=one.device)) for one in products]
            if apart:
                term = self.config.orth_reg_weight * torch.stack(apart).mean()
                for (_, p), gradient in zip(matrices, torch.autograd.grad(term, [p for _, p in matrices]), strict=True):
                    p.grad += gradient

    def step(self, *_: Any) -> None:
        """After the optimizer's step, while gradients are there: score, and mask what the budget has no room for."""
        self.steps += 1
        if self.allocator is None or self.steps > self.config.total_step:
            return
        last = self.config.total_step - self.config.tfinal
        if self.steps > last:
            self.allocator.mask_using_rank_pattern(self.host, self.pattern)
            return
        _, pattern = self.allocator.update_and_allocate(self.host, self.steps, force_mask=self.steps == last)
        self.pattern = pattern or self.pattern

    def state_dict(self) -> dict[str, Any]:
        scores = self._scores
        if self.allocator is not None:
            scores = {kind: {plain(name): one for name, one in getattr(self.allocator, kind).items()}
                      for kind in _SCORES}  # fmt: skip
        pattern = {plain(name): kept for name, kept in self.pattern.items()}
        return {"steps": self.steps, "pattern": pattern, "scores": scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self._scores = state["steps"], state["scores"]
        self.pattern = {name: state["pattern"][plain(name)] for name, _ in self._parameters()
                        if plain(name) in state["pattern"]}  # fmt: skip

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.host.named_parameters()
                if any(f"lora_{which}.{self.adapter}" in name for which in "ABE")]  # fmt: skip


class Allocator(RankAllocator):
    """peft's, for steps in which some matrices have no gradient: those of a block that was skipped, or does not run
    yet. Of them nothing was learnt, and their scores stay as they were."""

    def update_ipt(self, model: nn.Module) -> None:
        unseen = {
            name: p
            for name, p in model.named_parameters()
            if "lora_" in name and self.adapter_name in name and p.grad is None
        }
        kept = [(getattr(self, kind), name) for kind in _SCORES for name in unseen if name in getattr(self, kind)]
        before = [scores[name].clone() for scores, name in kept]
        for parameter in unseen.values():
            parameter.grad = torch.zeros_like(parameter)
        super().update_ipt(model)
        for parameter in unseen.values():
            parameter.grad = None
        for (scores, name), score in zip(kept, before, strict=True):
            scores[name] = score

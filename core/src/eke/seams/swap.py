"""Other weights for validation and saving, training weights for training.

The trick it hides: values are exchanged inside the parameters, whose identity optimizers, DDP and compile rely
on; and a run that fails while other weights are in place gets its own back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


class Swap:
    """Exchange a module's tensors with others of the same names, and back.

    Args:
        module: Whose parameters and buffers are exchanged.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kept: dict[str, torch.Tensor] = {}  # the module's own values, while others are in place

    @property
    def active(self) -> bool:
        return bool(self.kept)

    @torch.no_grad()
    def enter(self, others: Mapping[str, torch.Tensor]) -> None:
        """Put ``others`` in place. Called twice, the second call changes nothing."""
        if self.active:
            return
        tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        unknown = sorted(set(others) - set(tensors))
        if unknown:
            raise KeyError(f"The module has no tensor {unknown[0]!r} to exchange; it has {', '.join(tensors)}.")
        self.kept = {name: tensors[name].detach().clone() for name in others}
        for name, value in others.items():
            tensors[name].copy_(value)

    @torch.no_grad()
    def leave(self) -> None:
        """Put the module's own values back. Without :meth:`enter` it does nothing."""
        if not self.active:
            return
        tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        for name, value in self.kept.items():
            tensors[name].copy_(value)
        self.kept = {}

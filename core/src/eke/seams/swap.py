"""Other weights for validation and saving, training weights for training.

The tricks it hides: values are exchanged inside the parameters, whose identity optimizers, DDP and compile rely
on; a run that fails while other weights are in place gets its own back; of a sharded parameter each process exchanges
its part, and FSDP2 has to forget what it gathered before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from eke.seams.shards import laid_out, local, reshard


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
        """Put ``others`` in place, by any name of a tied tensor, in any dtype and on any device, whole or sharded as
        the module's are. Called twice, the second call changes nothing.

        Raises:
            KeyError: the module has no tensor of a name.
        """
        if self.active:
            return
        tensors = self._tensors()
        unknown = sorted(set(others) - set(tensors))
        if unknown:
            raise KeyError(f"The module has no tensor {unknown[0]!r} to exchange; it has {', '.join(tensors)}.")
        self.kept = {name: tensors[name].detach().clone() for name in others}
        self.put(others)

    @torch.no_grad()
    def leave(self) -> None:
        """Put the module's own values back. Without :meth:`enter` it does nothing."""
        if not self.active:
            return
        self.put(self.kept)
        self.kept = {}

    @contextmanager
    def holding(self, others: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """``others`` in place inside the block."""
        self.enter(others)
        try:
            yield
        finally:
            self.leave()

    def values(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The module's own tensors of some names, as they are now."""
        tensors = self._tensors()
        return {name: tensors[name].detach() for name in names}

    @torch.no_grad()
    def put(self, values: Mapping[str, torch.Tensor]) -> None:
        """Write values into the module's tensors for good."""
        tensors = self._tensors()
        for name, value in values.items():
            local(tensors[name]).copy_(local(laid_out(value, tensors[name])))

    def _tensors(self) -> dict[str, torch.Tensor]:
        reshard(self.module)  # what is gathered is no parameter that trains, and would not see the exchange
        parameters = self.module.named_parameters(remove_duplicate=False)
        return {**dict(parameters), **dict(self.module.named_buffers(remove_duplicate=False))}

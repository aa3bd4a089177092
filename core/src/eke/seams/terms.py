"""Terms that techniques add to the loss of a step.

The trick it hides: a term made deep inside the model, by a hook, has to reach the number that Lightning calls backward
on, whatever ``training_step`` returns, and once for each pass over the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from eke.seams.step import log_own
from eke.spec import EkeError


class LossTerms:
    """Of the step at hand."""

    def __init__(self, module: LightningModule) -> None:
        self.module = module
        self.open = False
        self.terms: list[tuple[str, Tensor]] = []

    def add(self, owner: str, term: Tensor, name: str | None = None) -> None:
        """Add a scalar with graph.

        Raises:
            EkeError: no scalar.
        """
        if not self.open:
            return
        if term.ndim:
            raise EkeError(f"{owner} adds a loss of shape {tuple(term.shape)}: a scalar is needed, such as its mean.")
        self.terms.append((owner, term))
        if name is not None:
            log_own(self.module.trainer, self.module, owner, name, term)

    def around(self, call_next: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The outermost layer of ``training_step``."""
        self.open, self.terms = True, []
        try:
            output = call_next(*args, **kwargs)
            return self._added(output)
        finally:
            self.open, self.terms = False, []

    def _added(self, output: Any) -> Any:
        if not self.terms or output is None:
            return output
        total = sum(term for _, term in self.terms)
        if isinstance(output, Tensor):
            return output + total.to(output.device)
        return {**output, "loss": output["loss"] + total.to(output["loss"].device)}

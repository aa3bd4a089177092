"""The order in which a module's parts run, seen once with hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from eke.seams.blocks import BlocksError
from eke.seams.linear import Map


@dataclass
class Trace:
    """The order in which a block's parts ran, once, and what went through them.

    Args:
        root: The block, or better the whole model: what lies outside of it runs in the mode that it is in.
        forward: Runs it.
    """

    root: nn.Module
    forward: Callable[[], Any]
    at: dict[int, int] = field(default_factory=dict)  # of a module, its place in the order of first calls
    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        handles = []
        for part in self.root.modules():
            handles.append(part.register_forward_pre_hook(self._enter))
            handles.append(part.register_forward_hook(self._leave))
        try:
            with quiet(self.root):
                self.forward()
        finally:
            for handle in handles:
                handle.remove()
        if not self.at:
            raise BlocksError(f"forward() ran without the {type(self.root).__name__}: it has to run the model with it.")

    def _enter(self, module: nn.Module, args: Any) -> None:
        if id(module) not in self.at:
            self.at[id(module)] = len(self.at)
            if args and isinstance(args[0], Tensor):
                self.inputs[id(module)] = args[0]

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, (tuple, list)) and output else output
        if isinstance(output, Tensor):
            self.outputs.setdefault(id(module), output)

    def place(self, one: Map) -> int | None:
        return self.at.get(id(one.module))

    def first_after(self, inner: list[Map], able: list[Map]) -> Map | None:
        """The first of some maps that ran once all of the others had."""
        known = [self.place(one) for one in inner]
        if None in known:
            return None
        later = [one for one in able if (self.place(one) or -1) > max(known)]
        return min(later, key=self.place, default=None)

    def behind(self, norm: nn.Module, ends: tuple[Map, ...]) -> bool:
        """Whether a norm takes what a branch gave, and not the sum of it and the stream."""
        taken = self.inputs.get(id(norm))
        given = [self.outputs.get(id(one.module)) for one in ends]
        return taken is not None and any(
            one is not None and one.shape == taken.shape and torch.equal(one, taken) for one in given
        )


@contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Evaluation without a graph, to try a module out; modes and the random state are as before afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for part, mode in modes:
            part.training = mode

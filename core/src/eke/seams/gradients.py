"""Whether all that should train has a gradient.

Autograd says nothing of a parameter that the loss does not depend on: it keeps its value to the last bit, and the run
looks well. So the first steps are looked at, and what has had no gradient in any of them is named.
"""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from eke.seams import interceptor
from eke.seams.blocks import BlocksError, find_all_blocks
from eke.spec import NoGradientWarning

_LOOKS = 5  # experts that a router did not choose in the first step are chosen in one of the next


class GradientCheck:
    """Looks at each optimizer's parameters before its first steps.

    Args:
        module: Whose parameters they are, for names.
        all_of_it: Say of any parameter that it has none. Otherwise, as where a technique has put its own loss in place
            of the user's, only where it is all of the blocks.
    """

    def __init__(self, module: nn.Module, all_of_it: bool = True) -> None:
        self.module, self.all_of_it = module, all_of_it
        self._looks: dict[int, int] = {}  # optimizer to how often it was looked at
        self._without: dict[int, dict[int, nn.Parameter]] = {}  # and to what has had no gradient

    def look(self, optimizer: Optimizer) -> None:
        """Before a step. Says what has no gradient after the fifth one, or at once where it is all of the blocks."""
        key = id(optimizer)
        looks = self._looks.get(key, 0)
        if looks >= _LOOKS:
            return
        self._looks[key] = looks + 1
        held = {id(one): one for group in optimizer.param_groups for one in group["params"] if one.requires_grad}
        known = held if looks == 0 else self._without[key]
        without = {number: one for number, one in known.items() if number in held and one.grad is None}
        if without:
            skipped = _skipped(self.module)
            without = {number: one for number, one in without.items() if number not in skipped}
        self._without[key] = without
        cut_off = bool(without) and self._cut_off(held, without)
        if looks + 1 == _LOOKS or cut_off:
            self._looks[key] = _LOOKS
            if cut_off or self.all_of_it:
                self._say(without, cut_off)

    def end(self) -> None:
        """The run is over, perhaps before the fifth step."""
        for key, without in self._without.items():
            if self._looks[key] < _LOOKS and self.all_of_it:
                self._say(without, False)
        self._without = {}

    def _say(self, without: dict[int, nn.Parameter], cut_off: bool) -> None:
        names = [name for name, one in self.module.named_parameters() if id(one) in without]
        if not names:
            return
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        advice = (
            "No block has any. If blocks are recomputed, by activation checkpointing, say use_reentrant=False: the "
            "reentrant kind gives none where a block's inputs need none, as in a model whose first layers are frozen."
            if cut_off
            else "The loss does not depend on them. If that is meant, freeze them: requires_grad_(False)."
        )
        rank_zero_warn(
            f"Of what the optimizer holds this has had no gradient, and does not train: {shown}. {advice}",
            category=NoGradientWarning,
        )

    def _cut_off(self, held: dict[int, nn.Parameter], without: dict[int, nn.Parameter]) -> bool:
        """Whether something in the blocks should train, and none of it has a gradient, where other things have."""
        inside = held.keys() & _ids(self._in_blocks())
        return bool(inside) and inside <= without.keys() and len(without) < len(held)

    def _in_blocks(self) -> Iterable[nn.Module]:
        try:
            return [block for blocks in find_all_blocks(self.module) for block in blocks]
        except BlocksError:
            return []


def _skipped(module: nn.Module) -> set[int]:
    """Parameters of blocks that a technique leaves out of this step."""
    return _ids(
        one for one in module.modules() if any(isinstance(act, interceptor.Skip) for act in interceptor.actions(one))
    )


def _ids(modules: Iterable[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters()}

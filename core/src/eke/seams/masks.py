"""Masks on weights, their gradients and what an optimizer keeps for them, with one owner each.

The tricks it hides: Adam moves a weight whose gradient is zero for as long as its moments are not; a weight times 0 may
be -0 or NaN; growth gives parameters other names and sharding gives names other parameters; and masks that are chosen
on each process by itself drift apart. Nothing is put into the model: its modules, its state dict and its compiled code
stay what they are.

Call :meth:`Masks.before_step` between backward and clipping, and :meth:`Masks.after_step` after the optimizer's step.
Masked weights are stored and multiplied like any others: a mask by itself saves neither time nor memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eke.seams.shards import DTensor, laid_out, local, nearest, parameters, plain_name, whole
from eke.spec import EkeError


class MasksError(EkeError, ValueError):
    """Masks that cannot be put on, or two techniques that want one parameter."""


@dataclass
class _Claim:
    combine: bool
    off: dict[str, Tensor] = field(default_factory=dict)  # True where the weight is zero; laid out as the parameter
    of: dict[str, nn.Parameter] = field(default_factory=dict)


class Masks:
    """The masks of one module, for all techniques of a run.

    A mask is a bool tensor of its parameter's shape, True where the weight trains. With a sharded parameter it is
    given whole, the same on every process, or sharded like it.

    Example::

        masks = Masks(model)
        masks.claim("sparse", {"0.weight": model[0].weight.abs() > 0.1})
        loss.backward()
        masks.before_step()
        optimizer.step()
        masks.after_step()

    Args:
        module: Whose parameters are masked.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._claims: dict[str, _Claim] = {}
        self._asked: set[str] = set()
        self._dense: dict[str, Tensor] = {}

    def claim(
        self, owner: str, masks: Mapping[str, Tensor], *, combine: bool = False, optimizers: Iterable[Optimizer] = ()
    ) -> None:
        """Take parameters for a technique and put masks on them. Masked weights are zero from here on.

        Args:
            owner: Name of the technique.
            masks: Name of a parameter to its mask. A tied parameter has one mask, by whichever of its names.
            combine: Whether others may mask the same parameters. A weight then trains where all masks let it.
            optimizers: What they keep for masked weights is set to zero.

        Raises:
            MasksError: a name or a shape that the module does not have, a parameter that is taken, masks that differ
                between processes, or an optimizer whose state cannot be masked. Nothing is masked then.
        """
        claim = self._claims.get(owner)
        if claim is not None and claim.combine != combine:
            raise MasksError(f"{owner!r} claimed masks with combine={claim.combine} before. Say the same each time.")
        off = self._given(owner, masks)
        for name in off:
            if claim is not None and name in claim.off:
                raise MasksError(f"{owner!r} has a mask on {name!r} already. Change it by update().")
            for other, theirs in self._claims.items():
                if name in theirs.off and not (combine and theirs.combine):
                    unwilling = " and ".join(
                        repr(who) for who, may in ((owner, combine), (other, theirs.combine)) if not may
                    )
                    raise MasksError(
                        f"{owner!r} and {other!r} both mask {name!r}, and {unwilling} cannot share it. Let one of them "
                        "leave it out; a technique that bears another's zeros says so by combine=True."
                    )
        self._put(owner, off, combine, optimizers)

    def update(self, owner: str, masks: Mapping[str, Tensor], *, optimizers: Iterable[Optimizer] = ()) -> None:
        """Put other masks on parameters that a technique has claimed.

        Args:
            owner: Its name.
            masks: As for :meth:`claim`.
            optimizers: What they keep for weights that are now masked, or no longer, is set to zero: a weight that
                comes back begins without momentum. None are given: moments stay, and come back with the weight.

        Raises:
            MasksError: a parameter that it has not claimed; and as :meth:`claim`.
        """
        off = self._given(owner, masks)
        for name in off:
            if owner not in self._claims or name not in self._claims[owner].off:
                raise MasksError(f"{owner!r} has no mask on {name!r}: claim() it first.")
        self._put(owner, off, self._claims[owner].combine, optimizers)

    def release(self, owner: str) -> None:
        """Take a technique's masks off. What was zero is zero, and trains from now on."""
        self._claims.pop(owner, None)

    def mask(self, name: str) -> Tensor:
        """True where a parameter's weights train, laid out as the parameter. All True where nobody masks it."""
        parameter, name = self._find(name)
        off = self._off(name)
        return torch.ones_like(parameter, dtype=torch.bool) if off is None else ~off

    def density(self) -> dict[str, tuple[int, int]]:
        """Each masked parameter to how many of its weights train, and how many it has."""
        found = {}
        for name in self.names:
            off = whole(self._off(name))
            found[name] = off.numel() - int(off.sum()), off.numel()
        return found

    @property
    def names(self) -> list[str]:
        """Names of the parameters that have a mask."""
        self.follow()
        return list(dict.fromkeys(name for claim in self._claims.values() for name in claim.off))

    # ------------------------------------------------------------------ a step

    def ask_dense(self, *names: str) -> None:
        """Keep a copy of these parameters' gradients as they are before the next step's are masked."""
        self._asked.update(self._find(name)[1] for name in names)

    def dense_gradient(self, name: str) -> Tensor:
        """The gradient of all weights of a parameter in the last step for which :meth:`ask_dense` asked.

        Raises:
            MasksError: nobody asked.
        """
        name = self._find(name)[1]
        if name not in self._dense:
            raise MasksError(f"no gradient of {name!r} was kept: call ask_dense({name!r}) before the step.")
        return self._dense[name]

    @torch.no_grad()
    def before_step(self) -> None:
        """Mask the gradients. Before it they are those of all weights; clipping comes after it."""
        self._dense = {}
        for claim in self._claims.values():
            for name, off in claim.off.items():
                gradient = claim.of[name].grad
                if gradient is None:
                    continue
                if name in self._asked:
                    self._dense[name] = gradient.clone()
                    self._asked.discard(name)
                local(gradient).masked_fill_(local(off), 0)

    @torch.no_grad()
    def after_step(self) -> None:
        """Set masked weights to zero, whatever the optimizer did to them."""
        for claim in self._claims.values():
            for name, off in claim.off.items():
                local(claim.of[name]).masked_fill_(local(off), 0)

    def masked(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Other weights of the same names with the masks on: an average over several masks is denser than each."""
        found = dict(weights)
        names = {plain_name(name): name for name in weights}
        owners = parameters(self.module)
        for name in self.names:
            for alias in (one for one, parameter in owners.items() if parameter is owners[name] and one in names):
                off = laid_out(self._off(name), weights[names[alias]])
                found[names[alias]] = weights[names[alias]].masked_fill(off, 0)
        return found

    # ------------------------------------------------------------------ growth, sharding, checkpoints

    def follow(self, origin: Mapping[Tensor, Tensor] | None = None) -> None:
        """Find each masked parameter again after the model has changed its shape or was sharded.

        A parameter that is still there keeps its mask under whatever name it has now. One that is gone hands it on to
        the parameter that has its name and shape, as after sharding, else its mask goes too.

        Args:
            origin: New parameter to the old one that it is a copy of, as for ``growth.rebuild``: it gets a copy of the
                mask as well.
        """
        now = parameters(self.module)
        name_of: dict[int, str] = {}
        for name, parameter in now.items():
            name_of.setdefault(id(parameter), name)
        copies = [(new, old) for new, old in (origin or {}).items() if id(new) in name_of]
        for claim in self._claims.values():
            mine = {id(parameter): claim.off[name] for name, parameter in claim.of.items()}
            moved: dict[str, Tensor] = {}
            for name, off in claim.off.items():
                parameter = claim.of.get(name)
                if parameter is not None and id(parameter) in name_of:
                    moved[name_of[id(parameter)]] = off
                elif name in now and now[name].shape == off.shape:
                    moved.setdefault(name_of[id(now[name])], off)
            moved.update((name_of[id(new)], mine[id(old)]) for new, old in copies if id(old) in mine)
            claim.of = {name: now[name] for name in moved}
            claim.off = {name: laid_out(off, now[name]) for name, off in moved.items()}
        self.after_step()

    def state_dict(self) -> dict[str, Any]:
        """One bit for each weight. Where parameters are sharded, every process has to call it."""
        self.follow()

        def saved(off: Tensor) -> dict[str, Any]:
            return {"shape": list(off.shape), "bits": pack(~whole(off))}

        return {
            owner: {"combine": claim.combine, "masks": {name: saved(off) for name, off in claim.off.items()}}
            for owner, claim in self._claims.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the masks of a checkpoint on; those that are on now go.

        Raises:
            MasksError: the module has no such parameter.
        """
        now = parameters(self.module)
        self._claims = {}
        for owner, saved in state.items():
            claim = self._claims[owner] = _Claim(bool(saved["combine"]))
            for name, one in saved["masks"].items():
                shape = tuple(one["shape"])
                if name not in now or tuple(now[name].shape) != shape:
                    raise MasksError(
                        f"the checkpoint has a mask of {owner!r} on {name!r} of shape {shape}, and the module has "
                        + (f"{tuple(now[name].shape)} there." if name in now else f"{nearest(name, now)}.")
                        + " Build the model as it was when the checkpoint was written."
                    )
                claim.off[name] = ~unpack(one["bits"], shape)
        self.follow()

    # ------------------------------------------------------------------ parts

    def _find(self, name: str) -> tuple[nn.Parameter, str]:
        """A parameter by any of its names, and the first of them."""
        now = parameters(self.module)
        name = plain_name(name)
        if name not in now:
            raise MasksError(f"the module has no parameter {name!r} to mask. Near to it: {nearest(name, now)}.")
        parameter = now[name]
        return parameter, next(one for one, other in now.items() if other is parameter)

    def _off(self, name: str) -> Tensor | None:
        """Where any mask on a parameter is off."""
        found = None
        for claim in self._claims.values():
            if name in claim.off:
                found = claim.off[name] if found is None else found | claim.off[name]
        return found

    def _given(self, owner: str, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The complements of masks that a technique gave, checked, by the first name of each parameter."""
        self.follow()
        off: dict[str, Tensor] = {}
        for given, mask in masks.items():
            parameter, name = self._find(given)
            if mask.dtype != torch.bool or mask.shape != parameter.shape:
                raise MasksError(
                    f"the mask of {owner!r} on {given!r} is {mask.dtype} of shape {tuple(mask.shape)}: it has to be "
                    f"torch.bool of {tuple(parameter.shape)}, True where the weight trains."
                )
            if name in off and not torch.equal(whole(off[name]), ~whole(mask)):
                raise MasksError(f"{given!r} and {name!r} are one tied parameter, and were given two masks. Give one.")
            off[name] = ~mask
        _refuse_differences(owner, off)
        return {name: laid_out(one, self._find(name)[0]) for name, one in off.items()}

    def _put(self, owner: str, off: dict[str, Tensor], combine: bool, optimizers: Iterable[Optimizer]) -> None:
        optimizers = list(optimizers)
        before = {name: self._off(name) for name in off}
        for name in off:
            for optimizer in optimizers:
                check_state(optimizer, self._find(name)[0], name)
        claim = self._claims.setdefault(owner, _Claim(combine))
        claim.off.update(off)
        claim.of.update((name, self._find(name)[0]) for name in off)
        self.after_step()
        for name in off:
            now, old = self._off(name), before[name]
            changed = now if old is None else now ^ old
            for optimizer in optimizers:
                zero_state(optimizer, claim.of[name], changed)


def pack(mask: Tensor) -> Tensor:
    """A bool tensor as uint8, eight entries in a byte, the first in its lowest bit. On the CPU."""
    flat = mask.detach().cpu().reshape(-1)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).reshape(-1, 8)
    return (flat.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool tensor of a shape that :func:`pack` packed."""
    flat = (bits.cpu().unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return flat.reshape(-1)[: prod(shape)].bool().reshape(shape)


def check_state(optimizer: Optimizer, parameter: Tensor, name: str) -> None:
    """Refuse an optimizer that keeps something for several weights of a parameter in one number.

    Raises:
        MasksError: as with states of 8 bits, which are quantized by blocks, and with factored ones.
    """
    for level in _levels(optimizer):
        for key, value in level.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.ndim and not _elementwise(value, parameter):
                raise MasksError(
                    f"{type(level).__name__} keeps {key!r} of {name!r} in {value.dtype} of shape "
                    f"{tuple(value.shape)}: one number for several weights, so that single ones cannot be set to zero. "
                    "Keep this parameter's state in 32 bits, or leave moments as they are."
                )


@torch.no_grad()
def zero_state(optimizer: Optimizer, parameter: Tensor, where: Tensor) -> None:
    """Set what an optimizer keeps for some weights of a parameter to zero. Counts of steps stay.

    Args:
        optimizer: It, or one around it.
        parameter: One of its parameters; others are passed over.
        where: bool, of the parameter's shape and layout.
    """
    for level in _levels(optimizer):
        for value in level.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.ndim and _elementwise(value, parameter):
                local(value).masked_fill_(local(where).to(value.device), 0)


def _elementwise(value: Tensor, parameter: Tensor) -> bool:
    plain = type(value) in (Tensor, nn.Parameter, DTensor)
    return plain and value.is_floating_point() and value.shape == parameter.shape


def _levels(optimizer: Any) -> list[Optimizer]:
    """An optimizer and those that it wraps."""
    found: list[Optimizer] = []
    while optimizer is not None and all(optimizer is not one for one in found):
        if isinstance(optimizer, Optimizer):
            found.append(optimizer)
        inner = (getattr(optimizer, name, None) for name in ("base", "optim", "optimizer"))
        optimizer = next((one for one in inner if isinstance(one, Optimizer)), None)
    return found


def _refuse_differences(owner: str, off: Mapping[str, Tensor]) -> None:
    """Compare masks between processes: a draw or a score of one process's own would part their weights."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_world_size() == 1 or torch.distributed.get_backend() == "fake":
        return
    mine = {name: zlib.crc32(pack(one).numpy()) for name, one in off.items() if not isinstance(one, DTensor)}
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            name = next((one for one in everyone[0] if theirs.get(one) != everyone[0][one]), "a parameter")
            raise MasksError(
                f"process {rank} has another mask of {owner!r} on {name!r} than process 0. Choose masks from weights "
                "or from gradients that were reduced, and draw from a generator with one seed for all processes."
            )

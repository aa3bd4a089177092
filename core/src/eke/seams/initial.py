"""The weights as they were at some step, to be rewound to.

The tricks it hides: a checkpoint holds the weights of now, so that a run which resumes has to bring the old ones along;
and kept beside the model they would fill the GPU. They wait in CPU memory, or in a file that is read where it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eke.seams.names import NamesError, match_parameters, meets
from eke.seams.shards import DTensor, load_parts, local, nearest, parameters, save_parts
from eke.spec import EkeError


class InitialError(EkeError, ValueError):
    """Weights that were not kept, or cannot be put back."""


class InitialWeights:
    """Keep the weights of parameters as they are now, and put them back bit for bit.

    Example::

        initial = InitialWeights(model)
        initial.keep()  # at step 0, or k
        ...             # train, and choose a mask by what came out
        initial.rewind()
        masks.after_step()

    Args:
        module: Whose weights.
        names: Patterns of names, such as ``"*.weight"``; all parameters by default. A tied one is kept once.
        file: Keep them there instead of in memory; with several processes each adds its number to the name. It is
            read from as long as this object lives.

    Raises:
        InitialError: a pattern that no parameter's name meets.

    Source:
        Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, https://arxiv.org/abs/1803.03635; rewinding to a
        later step: Frankle, Dziugaite, Roy, Carbin, ICML 2020, https://arxiv.org/abs/1912.05671.
    """

    def __init__(self, module: nn.Module, names: Iterable[str] = ("*",), file: str | Path | None = None) -> None:
        self.module = module
        self.patterns = (names,) if isinstance(names, str) else tuple(names)
        self.file = None if file is None else Path(file)
        self.kept: dict[str, Tensor] = {}  # this process's parts, on the CPU
        self._waiting: tuple[Mapping[str, Any], str | Path | None] | None = None
        try:
            match_parameters(module, self.patterns, "names")
        except NamesError as error:
            raise InitialError(str(error)) from None

    def keep(self) -> None:
        """Remember the weights as they are now, in place of what was kept before."""
        self._hold({name: local(one.detach()).to("cpu", copy=True) for name, one in self._chosen().items()})
        self._waiting = None

    @torch.no_grad()
    def rewind(self, names: Iterable[str] = ("*",)) -> None:
        """Put the weights back that were kept. Optimizer states, and masks, are the caller's.

        Args:
            names: Patterns of names, of those that were kept.

        Raises:
            InitialError: nothing was kept, or a parameter is gone or has another shape.
        """
        self._take_up()
        if not self.kept:
            raise InitialError("no weights were kept: call keep() at the step to which a rewind should go.")
        patterns = (names,) if isinstance(names, str) else tuple(names)
        now = parameters(self.module)
        chosen = {name: value for name, value in self.kept.items() if any(meets(name, one) for one in patterns)}
        for name, value in chosen.items():
            if name not in now or local(now[name]).shape != value.shape:
                found = f"has shape {tuple(local(now[name]).shape)}" if name in now else "is gone"
                raise InitialError(
                    f"{name!r} was kept with shape {tuple(value.shape)} and {found}: a model that has grown, or is "
                    "sharded otherwise, cannot be rewound. Keep its weights after the change."
                )
        for name, value in chosen.items():
            local(now[name]).copy_(value)

    def state_dict(self, checkpoint: dict[str, Any] | None = None, key: str = "initial") -> dict[str, Any]:
        """Tensors and plain values. Where parameters are sharded, every process has to call it.

        Args:
            checkpoint: Which is about to be saved, for ``TechniqueCallback.alter_checkpoint``: if it is sharded, the
                weights are put there in parts. Without it, the state holds them whole.
            key: Under which.
        """
        self._take_up()
        now = parameters(self.module)
        tensors = {name: _like(value, now[name]) for name, value in self.kept.items()}
        return {"saved": save_parts({"state_dict": {}} if checkpoint is None else checkpoint, key, tensors)}

    def load_state_dict(self, state: Mapping[str, Any], path: str | Path | None = None) -> None:
        """Take up what a checkpoint kept: at its first use, when the model is sharded.

        Args:
            state: From :meth:`state_dict`.
            path: ``trainer.ckpt_path``, where the checkpoint was saved sharded.
        """
        self._waiting = state["saved"], path

    def _chosen(self) -> dict[str, nn.Parameter]:
        return match_parameters(self.module, self.patterns, "names")

    def _take_up(self) -> None:
        if self._waiting is None:
            return
        (saved, path), self._waiting = self._waiting, None
        now = parameters(self.module)
        for name in saved.get("tensors") or saved.get("sharded") or ():
            if name not in now:
                raise InitialError(
                    f"the checkpoint kept the weights of {name!r}, which the module does not have. Near to it: "
                    f"{nearest(name, now)}. Build the model as it was when the checkpoint was written."
                )
        self._hold({name: local(one).cpu() for name, one in load_parts(saved, now, path).items()})

    def _hold(self, kept: dict[str, Tensor]) -> None:
        self.kept = kept
        if self.file is None or not kept:
            return
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        several = distributed and torch.distributed.get_world_size() > 1
        file = self.file.with_name(f"{self.file.name}.{torch.distributed.get_rank()}") if several else self.file
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.part")
        torch.save(kept, part)
        part.replace(file)  # an older file that is being read stays what it is until nobody reads it
        self.kept = torch.load(file, mmap=True, weights_only=True)


def _like(part: Tensor, parameter: Tensor) -> Tensor:
    """A process's part of a tensor, as the sharded tensor that it is a part of."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part.to(local(parameter).device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )

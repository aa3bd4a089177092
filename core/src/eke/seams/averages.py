"""Averages of a model's weights over the steps of a run, as many at once as there are objects.

The tricks it hides: a weight that moves by less than half the spacing of bfloat16 never moves an average kept in
bfloat16; the average of a grown model belongs to parameters, not to names; frozen and quantized weights have none; and
statistics of batch norms belong to the weights they were measured with, so that averaged weights need others.

Call ``update()`` after the optimizer's step, as often as the method says. ``weights()`` is for
:meth:`eke.TechniqueCallback.eval_weights`, or for :class:`eke.seams.swap.Swap`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eke.seams.names import plain
from eke.seams.scoring import evaluating
from eke.seams.shards import laid_out, load_parts, local, nearest, reshard, save_parts
from eke.seams.state import rng_state, set_rng_state
from eke.spec import ArgumentError, EkeError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class AveragesError(EkeError, ValueError):
    """An average that cannot be taken, or read back."""


def ema(decay: float, bias: str = "correct") -> Callable[[int], float]:
    """Share of the newest weights in an exponential moving average, by the number of the update, from 1 on.

    Args:
        decay: What is left of an older value after one update, 0 to 1. 0.999 averages over about a thousand updates.
        bias: What is done about the beginning, where there is no past. ``"correct"``: weights count decay^age, divided
            by the sum of what they count, as Adam corrects its moments. ``"warm up"``: decay is at most
            (1 + n) / (10 + n) at update n. ``"first"``: the first weights stand for all the past, and count decay^n
            after n further updates, a long time.

    Raises:
        ValueError: another decay or bias.

    Source:
        Kingma and Ba, "Adam", ICLR 2015, https://arxiv.org/abs/1412.6980, section 3, for the correction. The warm-up is
        that of TensorFlow's ExponentialMovingAverage with num_updates.
    """
    if not 0 <= decay < 1:
        raise ArgumentError(f"decay={decay}: it has to be from 0 to below 1. 0.999 is usual.")
    if bias == "correct":
        return lambda update: (1 - decay) / (1 - decay**update)
    if bias == "warm up":
        return lambda update: 1.0 if update == 1 else 1 - min(decay, (1 + update) / (10 + update))
    if bias == "first":
        return lambda update: 1.0 if update == 1 else 1 - decay
    raise ArgumentError(f"bias={bias!r}: use 'correct', 'warm up' or 'first'.")


def equal() -> Callable[[int], float]:
    """Share of the newest weights in a mean in which all count the same: stochastic weight averaging.

    Source:
        Izmailov, Podoprikhin, Garipov, Vetrov, Wilson, "Averaging Weights Leads to Wider Optima and Better
        Generalization", UAI 2018, https://arxiv.org/abs/1803.05407, algorithm 1.
    """
    return lambda update: 1 / update


class _Average:
    """What averages share: which tensors, where they are kept, and checkpoints."""

    def __init__(
        self,
        module: nn.Module,
        *,
        buffers: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.module = module
        self.buffers = buffers
        self.dtype = dtype
        self.device = device
        self.updates = 0
        self._slots: deque[dict[Hashable, Tensor]] = deque()
        self._waiting: tuple[Mapping[str, Any], str | Path | None] | None = None

    def weights(self) -> dict[str, Tensor]:
        """The average by every name that the module has for a tensor, in its dtype; none before the first update."""
        self._take_up()
        average = self._average()
        tensors = list(self._tensors())
        cast = {key: laid_out(average[key].to(tensor.dtype), tensor) for _, key, tensor in tensors if key in average}
        return {name: cast[key] for name, key, _ in tensors if key in cast}

    def state_dict(self, checkpoint: dict[str, Any] | None = None, key: str = "average") -> dict[str, Any]:
        """Tensors and plain values. Where parameters are sharded, every process has to call it.

        Args:
            checkpoint: Which is about to be saved, for ``TechniqueCallback.alter_checkpoint``: if it is sharded, the
                average is put there in parts. Without it, the state holds the average whole.
            key: Under which; each average needs its own.
        """
        self._take_up()
        tensors = {
            f"{number}/{plain(name)}": slot[place]
            for number, slot in enumerate(self._slots)
            for name, place, _ in self._first_names()
            if place in slot
        }
        saved = save_parts({"state_dict": {}} if checkpoint is None else checkpoint, key, tensors)
        return {"updates": self.updates, "slots": len(self._slots), "saved": saved}

    def load_state_dict(self, state: Mapping[str, Any], path: str | Path | None = None) -> None:
        """Take up a checkpoint's average: at its first use, when the model is sharded.

        Args:
            state: From :meth:`state_dict`.
            path: ``trainer.ckpt_path``, where the checkpoint was saved sharded.
        """
        self.updates = int(state["updates"])
        self._waiting = state, path

    def follow(self, origin: Mapping[Tensor, Tensor]) -> None:
        """Give new parameters of a grown model a copy of the averages of those that they are copies of.

        Others begin at their own value at the next update.

        Args:
            origin: New parameter to the old one, as for ``growth.rebuild``.
        """
        self._take_up()
        for slot in self._slots:
            copies = {new: slot[old].clone() for new, old in origin.items() if old in slot}
            slot.update(copies)

    def _average(self) -> dict[Hashable, Tensor]:
        raise NotImplementedError

    def _kept(self, tensor: Tensor) -> Tensor:
        """A copy of a weight in the dtype and the place in which this average keeps it."""
        tensor = tensor.detach()
        return tensor.to(device=self.device or tensor.device, dtype=self._dtype(tensor), copy=True)

    def _dtype(self, tensor: Tensor) -> torch.dtype:
        raise NotImplementedError

    def _tensors(self) -> Iterator[tuple[str, Hashable, Tensor]]:
        """Name, key and value of each tensor that has an average. A tied one comes by each of its names.

        A parameter is its own key, whatever name growth gives it; a buffer's is its module and its name there, since a
        module may put another tensor in its place.
        """
        reshard(self.module)
        known = self._slots[-1] if self._slots else {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if parameter.is_floating_point() and (parameter.requires_grad or parameter in known):
                yield name, parameter, parameter
        if not self.buffers:
            return
        floating = [
            (f"{path}.{name}" if path else name, (owner, name), buffer)
            for path, owner in self.module.named_modules(remove_duplicate=False)
            for name, buffer in owner.named_buffers(recurse=False)
            if buffer.is_floating_point()
        ]
        saved = self.module.state_dict(keep_vars=True) if floating else {}
        yield from (one for one in floating if one[0] in saved)  # others are computed anew from the configuration

    def _first_names(self) -> Iterator[tuple[str, Hashable, Tensor]]:
        """As :meth:`_tensors`, each tensor once."""
        seen = set()
        for name, key, tensor in self._tensors():
            if key not in seen:
                seen.add(key)
                yield name, key, tensor

    def _take_up(self) -> None:
        """Lay out what a checkpoint held as the parameters are now.

        Raises:
            AveragesError: the module has no such tensor.
        """
        if self._waiting is None:
            return
        (state, path), self._waiting = self._waiting, None
        saved = state["saved"]
        reshard(self.module)
        here: dict[str, tuple[Hashable, Tensor]] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            here[plain(name)] = parameter, parameter
        for place, owner in self.module.named_modules(remove_duplicate=False):
            for name, buffer in owner.named_buffers(recurse=False):
                here[plain(f"{place}.{name}" if place else name)] = (owner, name), buffer
        names = list(saved.get("tensors") or saved.get("sharded") or ())
        like = {}
        for numbered in names:
            name = numbered.partition("/")[2]
            if name not in here:
                raise AveragesError(
                    f"the checkpoint has an average of {name!r}, which the module does not have. Near to it: "
                    f"{nearest(name, here)}. Build the model as it was when the checkpoint was written."
                )
            like[numbered] = here[name][1]
        self._slots = deque({} for _ in range(state["slots"]))
        for numbered, value in load_parts(saved, like, path).items():
            number, _, name = numbered.partition("/")
            self._slots[int(number)][here[name][0]] = value.to(self.device or value.device)


class RunningAverage(_Average):
    """A mean to which each update adds the newest weights with some share: an EMA, or SWA's equal mean.

    Args:
        module: Whose trainable weights are averaged.
        share: By the number of the update, from 1 on: :func:`ema` or :func:`equal`. At update n the average goes by
            ``share(n)`` of its distance to the weights.
        buffers: Average floating-point buffers too, such as batch norms' statistics. Without it the module's own stay,
            or :func:`batch_statistics` measures them anew.
        dtype: In which the average is kept. By default float32 for weights in half precision, else the weights' own.
        device: Where it is kept. By default beside the weights.
    """

    def __init__(self, module: nn.Module, share: Callable[[int], float], **options: Any) -> None:
        super().__init__(module, **options)
        self.share = share

    @torch.no_grad()
    def update(self) -> None:
        """Let the weights as they are now take part."""
        self._take_up()
        self.updates += 1
        share = self.share(self.updates)
        if not self._slots:
            self._slots.append({})
        slot = self._slots[0]
        for _, key, tensor in self._first_names():
            if key in slot:
                mean = local(slot[key])
                mean.lerp_(local(tensor.detach()).to(mean.device, mean.dtype), share)
            else:
                slot[key] = self._kept(tensor)

    def _average(self) -> dict[Hashable, Tensor]:
        return self._slots[0] if self._slots else {}

    def _dtype(self, tensor: Tensor) -> torch.dtype:
        return self.dtype or torch.promote_types(tensor.dtype, torch.float32)


class LatestAverage(_Average):
    """The equal mean of the last ``count`` weights that it was shown: latest weight averaging.

    The mean is taken anew from all of them each time, in float32 at least, so that nothing adds up over a long run.

    Args:
        module: Whose trainable weights are averaged.
        count: Snapshots, k in the paper. Each needs the memory of the weights.
        buffers, device: As for :class:`RunningAverage`.
        dtype: In which snapshots are kept. By default the weights' own.

    Raises:
        ValueError: ``count`` below 1.

    Source:
        Kaddour, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging", 2022,
        https://arxiv.org/abs/2209.14981, section 2.
    """

    def __init__(self, module: nn.Module, count: int, **options: Any) -> None:
        if count < 1:
            raise ArgumentError(f"count={count} averages over nothing: 1 or more snapshots are needed.")
        super().__init__(module, **options)
        self.count = count

    @torch.no_grad()
    def update(self) -> None:
        """Keep the weights as they are now, and forget the oldest."""
        self._take_up()
        self.updates += 1
        self._slots.append({key: self._kept(tensor) for _, key, tensor in self._first_names()})
        while len(self._slots) > self.count:
            self._slots.popleft()

    def _average(self) -> dict[Hashable, Tensor]:
        if not self._slots:
            return {}
        found = {}
        for key, newest in self._slots[-1].items():
            held = [slot[key] for slot in self._slots if key in slot]  # one that is younger than the ring has fewer
            total = held[0].to(torch.promote_types(newest.dtype, torch.float32), copy=True)
            for one in held[1:]:
                local(total).add_(local(one))
            found[key] = total / len(held)
        return found

    def _dtype(self, tensor: Tensor) -> torch.dtype:
        return self.dtype or tensor.dtype


@torch.no_grad()
def batch_statistics(
    module: nn.Module, run: Callable[[Any], Any], batches: Iterable[Any], weights: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The statistics that batch norms would have with other weights, from a pass over some batches.

    All batches count the same, and under several processes all of their batches. Nothing else is in training mode;
    weights, statistics, modes and random state are as before afterwards.

    Args:
        module: The model. It may have no batch norm: then nothing is run.
        run: Calls the model with a batch, such as ``lambda batch: model(batch[0])``.
        batches: At least one.
        weights: Put in place meanwhile, such as ``average.weights()``.

    Returns:
        Name of each running mean and variance to its value, to be put beside ``weights``.

    Raises:
        ValueError: no batches.

    Source:
        Izmailov et al., UAI 2018, https://arxiv.org/abs/1803.05407, algorithm 1's last line.
    """
    from eke.seams.swap import Swap

    norms = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, BATCH_NORMS) and part.running_mean is not None
    }
    if not norms:
        return {}
    own = {name: value.clone() for name, value in module.named_buffers()}
    momenta, random = [part.momentum for part in norms.values()], rng_state()
    swap, seen = Swap(module), 0
    try:
        with swap.holding(weights or {}), evaluating(module):
            for part in norms.values():
                part.train()
                part.momentum = None  # torch's word for: all batches count the same
                part.reset_running_stats()
            for batch in batches:
                run(batch)
                seen += 1
            if not seen:
                raise ArgumentError("batches is empty: statistics need one batch or more.")
            found = {
                f"{name}.{kind}" if name else kind: getattr(part, kind).clone()
                for name, part in norms.items()
                for kind in ("running_mean", "running_var")
            }
    finally:
        for part, momentum in zip(norms.values(), momenta, strict=True):
            part.momentum = momentum
        for name, value in module.named_buffers():
            value.copy_(own[name])
        set_rng_state(random)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for value in found.values():
            torch.distributed.all_reduce(value)
            value /= torch.distributed.get_world_size()
    return found

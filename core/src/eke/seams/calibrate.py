"""A few batches, and the gradients that they give, before training: for scores and scales at the start of a run.

The tricks it hides: an iterator over a loader moves samplers, generators, persistent workers and the user's data set,
some of which nobody could put back; so batches are drawn in a copy of the process. A backward pass moves gradients,
batch statistics, metrics, random numbers and what techniques remember; all of that is put back. DDP's reducer, which
would lay out its buckets by what it sees, does not see the pass.

Call these from ``on_train_start`` or later: before it a run has no loaders. Whatever they do, the run goes on to the
bits of a run without them.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from eke import compat
from eke.seams.names import NamesError, match_parameters, plain
from eke.seams.scoring import evaluating
from eke.seams.shards import DTensor, local
from eke.seams.state import rng_state, set_rng_state
from eke.seams.step import loss_of, muted, step_arguments
from eke.seams.trial import Snapshot, check_steppable, of_run, to_device
from eke.seams.wrap import bypassed
from eke.spec import EkeError


class CalibrationError(EkeError, ValueError):
    """Batches or gradients that cannot be had without moving the run."""


def sample_batches(trainer: Trainer, count: int, *, on_device: bool = True, timeout: float = 300.0) -> list[Any]:
    """The first batches of the running epoch, this process's own, drawn aside: the run still sees them.

    They hold the samples that the run itself trains on first, where one loader feeds it and Eke resumes that; else an
    order drawn anew. Random augmentation is the run's too if workers do it, or in the first batch: without workers it
    draws from the stream from which dropout will have drawn by then.

    Args:
        trainer: In ``fit``, from ``on_train_start`` on.
        count: How many.
        on_device: Cast and moved to the device, but not changed by techniques, as :func:`gradients` takes them. Without
            it they are as the loader gives them.
        timeout: Seconds after which drawing is given up.

    Raises:
        CalibrationError: there are no loaders yet, too few batches, or a platform that cannot copy a process.
    """
    loaders = compat.combined_loader(trainer)
    if loaders is None:
        raise CalibrationError("the run has no loaders yet. Ask for batches in on_train_start or later.")
    if not hasattr(os, "fork"):
        raise CalibrationError("batches are drawn aside in a copy of the process, by fork, which this platform lacks.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "batches")
        process = multiprocessing.get_context("fork").Process(target=_draw, args=(loaders, count, file))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)  # of threads, which the copy does not use
            process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise CalibrationError(
                f"{count} batches were not drawn in {timeout:g} s. Give timeout= more, or see the loader."
            )
        if not file.exists():
            raise CalibrationError(f"the process that drew batches ended with status {process.exitcode}.")
        drawn, problem = pickle.loads(file.read_bytes())
    if problem:
        raise CalibrationError(f"batches could not be drawn:\n{problem}")
    if len(drawn) < count:
        raise CalibrationError(f"an epoch has {len(drawn)} batches here, and {count} were asked for. Ask for fewer.")
    if not on_device:
        return drawn
    with bypassed(compat.batch_hook_owner(trainer, trainer.lightning_module), "on_after_batch_transfer"):
        state = rng_state()
        moved = [to_device(trainer, batch) for batch in drawn]
        set_rng_state(state)
    return moved


def _draw(loaders: Any, count: int, file: Path) -> None:
    """In the copy of the process: nothing that it does reaches the run."""
    torch.set_num_threads(1)  # the parent's threads were not copied
    try:
        position = getattr(loaders, "eke_position", None)
        if position is not None:
            position.rewind()
        for loader in loaders.flattened:
            if getattr(loader, "persistent_workers", False):
                vars(loader)["persistent_workers"] = False  # or the run's own would be asked; setattr refuses
            if getattr(loader, "pin_memory", False):
                loader.pin_memory = False  # a copied process may not touch the GPU
        # A copy, or the run's iterators would lose their owner, and end the run's workers as they go.
        outcome = [item[0] for item in islice(copy.copy(loaders), count)], ""
        content = pickle.dumps(outcome)
    except BaseException:
        content = pickle.dumps(([], traceback.format_exc()))
    part = file.with_suffix(".part")
    part.write_bytes(content)
    part.replace(file)
    os._exit(0)  # without finalizers, which belong to the run


def gradients(
    trainer: Trainer,
    module: LightningModule,
    batches: Sequence[Any],
    *,
    names: Iterable[str] = (),
    evaluate: bool = False,
) -> dict[str, Tensor]:
    """Gradients of the training loss, the mean over batches and processes. Nothing is logged, and nothing moves.

    The loss is that of the user's own ``training_step``, without what techniques do around it.

    Args:
        trainer: In ``fit``.
        module: Its module.
        batches: From :func:`sample_batches`; under several processes as many on each.
        names: Patterns of names of parameters, which get a gradient although they may be frozen. By default those that
            train.
        evaluate: In evaluation mode: without dropout, and with the statistics that batch norms have so far.

    Returns:
        Name to gradient, the same on all processes; sharded where parameters are. Zero where the loss does not depend
        on it.

    Raises:
        CalibrationError: no batches, a pattern that no name meets, a step without a loss, or gradients that are not
            finite.
        TrialError: a module that optimizes by hand, or a strategy with an engine of its own.
    """
    check_steppable(trainer, "a pass for gradients")
    if not batches:
        raise CalibrationError("batches is empty: gradients need one batch or more.")
    try:
        chosen = match_parameters(module, names, "names") if names else {}
    except NamesError as error:
        raise CalibrationError(str(error)) from None
    chosen = chosen or {plain(name): one for name, one in module.named_parameters() if one.requires_grad}
    snapshot, state = Snapshot(*of_run(trainer), light=_unmoved(trainer, module)), rng_state()
    try:
        for one in chosen.values():
            one.requires_grad_(True)
        scale = float(compat.loss_scale(trainer))
        found = _passes(trainer, module, batches, chosen, scale, evaluate)
        while scale > 1 and not all(map(_finite, found.values())):
            scale = max(scale / 16, 1.0)  # as the scaler would, until they fit half precision
            set_rng_state(state)
            found = _passes(trainer, module, batches, chosen, scale, evaluate)
    finally:
        snapshot.restore()
        set_rng_state(state)
        torch.clear_autocast_cache()  # it holds casts of weights, whose graph is gone
    for one in found.values():
        if trainer.world_size > 1 and not isinstance(one, DTensor):
            torch.distributed.all_reduce(one)
            one /= trainer.world_size
    broken = [name for name, one in found.items() if not _finite(one)]
    if broken:
        raise CalibrationError(f"the gradient of {broken[0]!r} is not finite. Look at the loss of the first batches.")
    return found


def _passes(
    trainer: Trainer,
    module: LightningModule,
    batches: Sequence[Any],
    chosen: dict[str, Tensor],
    scale: float,
    evaluate: bool,
) -> dict[str, Tensor]:
    strategy = trainer.strategy
    for one in module.parameters():
        one.grad = None
    with muted(module), bypassed(module, "training_step"):
        for number, batch in enumerate(batches):
            arguments = step_arguments(module, batch, number)
            with evaluating(module) if evaluate else nullcontext():
                if isinstance(strategy.model, DistributedDataParallel):
                    with trainer.precision_plugin.train_step_context():
                        output = module.training_step(*arguments)
                else:
                    output = strategy.training_step(*arguments)
            if output is None:
                raise CalibrationError(f"training_step gave no loss for batch {number}, so it has no gradient.")
            module.backward(loss_of(output) * (scale / len(batches)))
    return {
        name: torch.zeros_like(one) if one.grad is None else one.grad.detach() / scale for name, one in chosen.items()
    }


def _unmoved(trainer: Trainer, module: LightningModule) -> list[Tensor]:
    """Tensors that a forward and a backward pass do not write to: weights, and what optimizers keep for them."""
    moments = [
        value
        for optimizer in trainer.strategy.optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return [*module.parameters(), *moments]


def _finite(gradient: Tensor) -> bool:
    return bool(local(gradient).isfinite().all())

"""A technique on one model of the zoo: it trains and does what it promises there, or refuses in words that help."""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from eke import EkeError, NoEffectWarning, NoGradientWarning, TechniqueCallback
from eke.quiet import quiet
from eke.seams.blocks import BlocksError, find_all_blocks
from eke.testing.run import make_trainer, seed_everything
from eke.testing.zoo import ZOO, Animal
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

TRAINS, REFUSES, NOTHING = "trains", "refuses", "nothing to do"
STEPS = 2  # batches in an epoch
LONGEST = 700  # letters of a refusal

Build = Callable[[Animal], object]


@dataclass(eq=False)
class Seen(Callback):
    """What a run in the zoo showed, to be held against the same run without the technique.

    Attributes:
        animal: What was trained.
        technique: What was tried on it, None in the run without.
        losses: As ``training_step`` gave them, one a batch.
        rows: One counter a batch: path of a module without children to the rows that went through it with a gradient,
            which are tokens or samples: the entries of its input over those of a row. What is computed a second time in
            backward is not among them.
        again: The same of what ran in backward.
        calls: Calls, as ``rows`` counts rows.
        states: Bytes of optimizer states at the end.
        trained: Parameters that had a gradient, in numbers.
        parameters: Of the model at the end, in numbers.
        evaluated: Whether validation would see other weights than those that train.
        said: Warnings that the technique found nothing to act on.
    """

    animal: Animal
    technique: Any = None
    losses: list[float] = field(default_factory=list)
    rows: list[Counter[str]] = field(default_factory=list)
    again: list[Counter[str]] = field(default_factory=list)
    calls: list[Counter[str]] = field(default_factory=list)
    states: int = 0
    trained: int = 0
    parameters: int = 0
    evaluated: bool = False
    said: list[str] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    trainer: Trainer | None = None
    model: LightningModule | None = None
    stepped: bool = False

    def __post_init__(self) -> None:
        self._paths: dict[int, str] = {}
        self._hook: Any = None
        self._blocks: tuple[str, ...] | None = None

    # ------------------------------------------------------------------ for checks

    def in_blocks(self, counters: list[Counter[str]] | None = None, blocks: bool = True) -> int:
        """Rows in the repeated blocks, or outside of them, over all batches. In a model without blocks, all."""
        inside = tuple(f"{path}." for path in self.block_paths)
        return sum(
            count
            for counter in (self.rows if counters is None else counters)
            for path, count in counter.items()
            if not inside or path.startswith(inside) == blocks
        )

    def shares(self, plain: Seen) -> set[float]:
        """By layer of the blocks, rows with the technique over rows without: what does not go by sample has 1."""
        inside = tuple(f"{path}." for path in self.block_paths)
        total, without = (sum(counters, Counter()) for counters in (self.rows, plain.rows))
        return {total[path] / without[path] for path in without if not inside or path.startswith(inside)}

    def share_of(self, plain: Seen) -> str:
        """How many of the rows in the blocks there were, in words."""
        return f"{self.in_blocks()} of {plain.in_blocks()} rows"

    @property
    def block_paths(self) -> tuple[str, ...]:
        if self._blocks is None:
            try:
                self._blocks = tuple(found.path for found in find_all_blocks(self.animal.build(0)))
            except BlocksError:
                self._blocks = ()
        return self._blocks

    # ------------------------------------------------------------------ the run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trainer, self.model = trainer, pl_module
        self._hook = register_module_forward_hook(self._note)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._paths = {id(part): path for path, part in pl_module.named_modules() if not any(part.children())}
        for counters in (self.rows, self.again, self.calls):
            counters.append(Counter())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note_trained(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._note_trained(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.stepped = True
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self.losses.append(float("nan") if loss is None else float(loss))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()
        self.states = sum(
            tensor.untyped_storage().nbytes() if type(tensor) is Tensor else _bytes(tensor)
            for optimizer in trainer.optimizers
            for state in optimizer.state.values()
            for tensor in state.values()
            if isinstance(tensor, Tensor) and tensor.numel() > 1
        )
        self.parameters = sum(weight.numel() for weight in pl_module.parameters())
        self.weights = {name: _whole(weight) for name, weight in pl_module.named_parameters(remove_duplicate=False)}
        others = self.technique.eval_weights() if isinstance(self.technique, TechniqueCallback) else None
        self.evaluated = any(not torch.equal(_whole(one), self.weights[name]) for name, one in (others or {}).items())

    def on_exception(self, *_: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def _note_trained(self, model: LightningModule) -> None:
        self.trained = max(self.trained, sum(one.numel() for one in model.parameters() if one.grad is not None))

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        path = self._paths.get(id(module))
        if path is None or not self.rows or not torch.is_grad_enabled():
            return
        into = next((one for one in (*args, output) if isinstance(one, Tensor)), None)
        if into is None:
            return
        backward = torch._C._current_graph_task_id() != -1
        width = 1 if not into.is_floating_point() else into.shape[1 if _by_channel(module) else -1]
        (self.again if backward else self.rows)[-1][path] += into.numel() // max(width, 1)
        if not backward:
            self.calls[-1][path] += 1


def meets(
    animal: Animal,
    build: Build,
    shows: Callable[[Seen, Seen], str],
    epochs: int = 1,
    batches: int = STEPS,
    **options: Any,
) -> dict[str, str]:
    """Train an animal with a technique for a few steps.

    Args:
        animal: What is trained.
        build: Makes the technique for it.
        shows: Given the run without and the run with it, holds them against what the README promises: it raises an
            AssertionError, or returns in a few words what came of it.
        epochs, batches: Of the run, and in an epoch.
        options: Of the Trainer.

    Returns:
        ``technique`` and ``animal``; ``outcome``: "trains", "refuses" or "nothing to do"; and ``words``.

    Raises:
        AssertionError: losses that are not finite, a promise that is not kept, a technique that does nothing in
            silence, a refusal too late or in words that cannot help.
    """
    seen = Seen(animal, build(animal))
    refusal = _refusal(seen, epochs, batches, **options)
    if refusal is not None:
        assert not seen.stepped, f"refused only after the first step: {refusal}"
        readable(refusal)
        _helps(refusal, animal, build, epochs, batches, options)
        outcome, words = REFUSES, refusal
    else:
        assert len(seen.losses) > 0, "no batch was trained"
        assert not any(loss - loss for loss in seen.losses), f"losses are not finite: {seen.losses}"
        broken = [path for path, weight in seen.weights.items() if not weight.isfinite().all()]
        assert not broken, f"weights are not finite: {', '.join(broken)}"
        if seen.said:
            readable(seen.said[0])
            outcome, words = NOTHING, seen.said[0]
        else:
            outcome, words = TRAINS, shows(_plain(animal.name, epochs, batches), seen)
    record = getattr(type(seen.technique), "technique", None)
    return {"technique": getattr(record, "name", ""), "animal": animal.name, "outcome": outcome, "words": words}


def differs(plain: Seen, seen: Seen) -> str:
    """The check of a technique that has none of its own: the run is another than without it, in whatever way."""
    parts = [part for part in ("losses", "rows", "again", "calls", "states", "trained", "parameters", "evaluated")
             if getattr(plain, part) != getattr(seen, part)]  # fmt: skip
    moved = {path for path in plain.weights if path not in seen.weights}
    moved |= {path for path, weight in plain.weights.items() if path in seen.weights
              and not torch.equal(weight, seen.weights[path])}  # fmt: skip
    assert parts or moved, "the run is the same as without it, to the bit, and nothing was said"
    return ""


_PYTHON = re.compile(
    r"object has no attribute|NoneType|Traceback|unexpected keyword|size of tensor|mat1 and mat2|out of range|"
    r"takes \d+ positional|must match the|invalid for input|shape '\[|<class '|not subscriptable|<lambda>"
)


def readable(words: str) -> None:
    """One short paragraph in plain words."""
    assert "\n" not in words.strip(), f"a refusal is one paragraph; it said {words!r}"
    assert 20 <= len(words) <= LONGEST, f"a refusal says why, shortly ({len(words)} letters): {words!r}"
    assert not _PYTHON.search(words), f"a refusal is in words and not in Python's: {words!r}"


@cache
def _plain(name: str, epochs: int, batches: int) -> Seen:
    seen = Seen(ZOO[name])
    _train(seen, None, epochs, batches)
    return seen


def _train(
    seen: Seen,
    technique: object,
    epochs: int,
    batches: int,
    change: Callable[[LightningModule], None] | None = None,
    **options: Any,
) -> None:
    animal = seen.animal
    model, loader = animal.build(0), animal.loader(0, batches * animal.batch)
    if change is not None:
        change(model)
    with warnings.catch_warnings(record=True) as caught, quiet():
        warnings.simplefilter("always", NoEffectWarning)
        trainer = make_trainer(*([] if technique is None else [technique]), epochs=epochs, callbacks=[seen], **options)
        seed_everything(0)
        try:
            trainer.fit(model, loader)
        finally:
            seen._close()
    # A model's own part that the loss does not reach, such as DINOv2's mask token, is nothing that a technique says.
    told = [one for one in caught if issubclass(one.category, NoEffectWarning)]
    seen.said = [str(one.message) for one in told if not issubclass(one.category, NoGradientWarning)]


def _refusal(seen: Seen, epochs: int, batches: int, **options: Any) -> str | None:
    """The words in which a run is refused; None where it is not."""
    try:
        _train(seen, seen.technique, epochs, batches, **options)
    except EkeError as error:
        return str(error)
    return None


def _helps(words: str, animal: Animal, build: Build, epochs: int, batches: int, options: Mapping[str, Any]) -> None:
    """Follow the advice of a refusal, as far as it is written as an argument with its value: then it has to train."""
    for name, value, change in advice(words, build(animal), animal):
        seen = Seen(animal, build(animal))
        if change is None:
            setattr(seen.technique, name, value)
        try:
            again = _refusal(seen, epochs, batches, change=change, **options)
        except Exception as error:  # whatever it is
            raise AssertionError(
                f"{name}={value!r} is advised and ends in {type(error).__name__}: {error}. Advised was: {words}"
            ) from error
        assert again is None, f"{name}={value!r} is advised and does not help: {again} Advised was: {words}"


def advice(words: str, technique: object, animal: Animal) -> list[tuple[str, Any, Any]]:
    """Arguments of the technique, or settings of the model's configuration, that a refusal names with a value."""
    known = set(inspect.signature(type(technique)).parameters)
    found = []
    for name, text in re.findall(r"\b(\w+)=('[^']*'|\"[^\"]*\"|\[[^\]]*\]|True|False|None|[\d.]+\d|\d)", words):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            continue
        if value is ... or value == [...]:
            continue
        if name in known:
            if getattr(technique, name, None) != value and hasattr(technique, name) and text not in ("''",):
                found.append((name, value, None))
        elif name in ("use_cache",):
            assert "transformers" in animal.needs, f"{name}={value} is advised for a model that has none: {words}"
            found.append((name, value, lambda model, name=name, value=value: _configure(model, name, value)))
    return found


def _configure(model: LightningModule, name: str, value: Any) -> None:
    assert getattr(model.model.config, name, None) != value, f"{name}={value!r} is advised and is so already"
    setattr(model.model.config, name, value)


def _by_channel(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d))


def _bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "to_local"):
        return _bytes(tensor.to_local())  # this process's part
    parts = getattr(tensor, "__tensor_flatten__", None)
    if parts is None:
        return tensor.nbytes
    return sum(_bytes(getattr(tensor, name)) for name in parts()[0])


def _whole(weight: Tensor) -> Tensor:
    weight = weight.detach()
    return (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).clone().float()

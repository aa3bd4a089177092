"""What a record's effects say, proved: who declares that it changes weights changes them, who does not leaves them.

Two runs of the same model, one without the technique and one with it, are watched from inside the user's own methods.
For each resource an observation says whether it was changed. Not observed are the four shardings, which one process
does not show, and what is only read or kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from eke.seams.blocks import BlocksError, find_blocks
from eke.seams.losses import as_trained
from eke.testing.checks import Subject
from eke.testing.compare import checksum
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Resource to those that, where one of them is declared, explain a difference in it as well.
EXPLAINED_BY: dict[str, tuple[str, ...]] = {
    "samples": (),
    "batch content": (),
    "batch subset": (),
    "module tree": (),
    "attention": ("module tree",),
    "precision": ("module tree",),
    "requires_grad": ("module tree",),
    "weights": (),
    "hidden states": (
        "samples", "batch content", "batch subset", "module tree", "attention", "precision", "weights", "tokens"
    ),
    "tokens": ("samples", "batch content", "batch subset", "module tree", "hidden states"),
    "saved tensors": (
        "samples", "batch content", "batch subset", "module tree", "attention", "precision", "requires_grad",
        "tokens", "hidden states", "loss",
    ),
    "optimizer": ("module tree", "requires_grad"),
    "optimizer state": ("optimizer", "module tree", "requires_grad"),
    "loss": ("module tree", "hidden states"),
    "gradients": (),
    "learning rate": (),
    "weights-at-eval": (),
}  # fmt: skip


def proves_its_effects(subject: Subject, unseen: Mapping[str, str] | None = None) -> None:
    """Each effect that the record declares is seen in a run, and no other is.

    Args:
        subject: What is checked.
        unseen: Effects that this run of a dozen steps cannot show, such as ``"changes optimizer"``, each to the
            sentence why.
    """
    unseen = unseen or {}
    record = subject.record
    assert record is not None, "there is no record to prove"
    declared = record.touches("replaces") | record.touches("changes")
    # Who reads the loss of each sample takes the mean itself, and so keeps other tensors for backward.
    explaining = declared | (record.touched() & {"loss"})
    strange = sorted(set(unseen) - set(record.effects))
    assert not strange, f"unseen names what the record does not declare: {', '.join(strange)}"
    seen = observe(subject)
    wrong = [
        f"{resource!r} was changed ({seen[resource]}), and the record declares neither 'replaces {resource}' nor "
        f"'changes {resource}'"
        for resource in EXPLAINED_BY
        if seen[resource] and resource not in declared and not explaining & set(EXPLAINED_BY[resource])
    ]
    excused = {effect.partition(" ")[2] for effect in unseen}
    wrong += [
        f"{resource!r} is declared, and was not changed in {subject.epochs} epochs of {subject.steps} steps"
        for resource in EXPLAINED_BY
        if resource in declared and resource not in excused and not seen[resource]
    ]
    wrong += [
        f"unseen excuses {effect!r}, which was seen: {seen[resource]}"
        for effect in unseen
        if seen.get(resource := effect.partition(" ")[2])
    ]
    assert not wrong, "\n".join(wrong)


def observe(subject: Subject) -> dict[str, str]:
    """Resource to what was seen of its change, in a few words; empty where nothing was."""
    key = (subject.model, subject.epochs, subject.steps, repr(subject.options))
    if key not in _PLAIN:
        _PLAIN[key] = _Watch()
        _watched(subject, _PLAIN[key])
    own = _Watch()
    _watched(subject, own, subject.build())
    return {resource: _CHANGED[resource](_PLAIN[key], own) for resource in EXPLAINED_BY}


_PLAIN: dict[Any, _Watch] = {}  # runs without a technique, which are the same each time


def _watched(subject: Subject, watch: _Watch, *techniques: object) -> None:
    model = _probed(subject.model, watch)
    watch.initial = _weights(model)
    with watch.listening(model):
        done = subject.fit(model, *techniques, validate=True, callbacks=[watch])
    watch.trace, watch._model = done.state["steps"], None


class _Watch(Callback):
    """Takes down what a run shows of each resource. Comes after the techniques, and so sees what they did."""

    def __init__(self) -> None:
        self.initial: dict[str, int] = {}
        self.trace: dict[str, Any] = {}
        self.samples: list[list[int]] = []  # of each step, as the loader gave them
        self.known: set[int] = set()  # checksums of all samples
        self.trees: list[dict[str, Any]] = []
        self.foreign_rows = 0  # rows that the user's step was given and the data do not hold
        self.fewer_rows = 0  # steps on fewer rows than the loader gave
        self.attention: set[Any] = set()
        self.rounded: set[str] = set()  # linear layers that compute something else than x W + b
        self.outside: list[str] = []  # weights that changed other than by a step
        self.outside_state: list[str] = []
        self.calls: list[list[tuple[str, Any]]] = []  # of each step: module and shape of its first input
        self.outputs: list[tuple[str, int]] = []  # of the first step
        self.lengths: list[set[int]] = []  # of each step: tokens that its blocks were given
        self.saved = 0  # bytes that the first step keeps for backward
        self.optimizer: Any = None
        self.state_form: Any = None
        self.losses: list[tuple[float | None, float]] = []  # plain loss of what the model gave, and the loss trained on
        self.gradients = 0  # of how many parameters and steps other ones were stepped by than backward gave
        self.at_eval = 0  # validations with other weights than the last batch left
        self._rows = 0
        self._first: dict[Tensor, Tensor] = {}  # gradients as the first backward of a batch gave them
        self._after: dict[str, int] | None = None  # weights after the last step
        self._trained: dict[str, int] | None = None  # the same after what techniques do to them behind the step
        self._state: dict[Any, Any] | None = None
        self._stepped = False
        self._in_step = False
        self._logits: Tensor | None = None
        self._targets: Tensor | None = None
        self._names: dict[int, str] = {}
        self._blocks: set[int] = set()
        self._hooked: list[Any] = []
        self._left = ExitStack()
        self._held: dict[int, Tensor] = {}
        self._model: LightningModule | None = None

    def listening(self, model: LightningModule) -> ExitStack:
        """Hear every module's call while the block runs, from outside of the modules."""
        self._model = model
        stack = ExitStack()
        stack.enter_context(as_trained())
        stack.callback(nn.modules.module.register_module_forward_hook(self._called).remove)
        stack.callback(self._leave)
        return stack

    def _leave(self) -> None:
        self._left.close()

    # ------------------------------------------------------------------ a step, as Lightning goes through it

    def raw(self, batch: Any) -> None:
        """What the loader gave, before anything has changed it."""
        self._rows = _rows(batch)
        self.samples.append(_checksums(batch))

    def on_train_batch_start(self, trainer: Trainer, model: LightningModule, batch: Any, batch_idx: int) -> None:
        self._compare_weights(model)
        self.trees.append({name: tuple(weight.shape) for name, weight in model.named_parameters()} | {
            f"module {name}": True for name, _ in model.named_modules()})  # fmt: skip
        self._names = {id(module): name for name, module in model.named_modules()}
        try:
            self._blocks = {id(module) for module in find_blocks(model).modules}
        except BlocksError:
            self._blocks = set()
        self._hook(trainer, model)
        if not self.rounded:
            self.rounded = _rounded(model)
        self.calls.append([])
        self.lengths.append(set())
        self._first, self._stepped, self._logits, self._targets, self._in_step = {}, False, None, None, True
        self._left.enter_context(_AttentionCalls(self.attention))
        if len(self.calls) == 1:
            self._left.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor))

    def given(self, model: LightningModule, batch: Any) -> None:
        """What the user's own step is given, once it trains."""
        if not torch.is_grad_enabled():
            return
        if self._targets is None:
            self._compare_weights(model)
        self.fewer_rows += _rows(batch) < self._rows
        self.foreign_rows += sum(row not in self.known for row in _checksums(batch))
        self._targets = batch[-1]

    def on_before_backward(self, trainer: Trainer, model: LightningModule, loss: Tensor) -> None:
        self._in_step = False
        self._left.close()
        if len(self.calls) == 1:
            own = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
            self.saved = sum(t.untyped_storage().nbytes() for key, t in self._held.items() if key not in own)
            self._held = {}

    def on_train_batch_end(
        self, trainer: Trainer, model: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._in_step = False
        self._left.close()
        plain = None
        if self._logits is not None and self._targets is not None and len(self._logits) == len(self._targets):
            plain = float(F.cross_entropy(self._logits.flatten(0, -2), self._targets.flatten()))
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.losses.append((plain, float(loss) if loss is not None else 0.0))
        self._trained = _weights(model)

    def on_train_end(self, trainer: Trainer, model: LightningModule) -> None:
        self._compare_weights(model)

    def validating(self, model: LightningModule) -> None:
        if self._trained is not None and not model.trainer.sanity_checking:
            now = _weights(model)
            self.at_eval += any(now.get(name, value) != value for name, value in self._trained.items())

    # ------------------------------------------------------------------ parts of it

    def _called(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._in_step or not torch.is_grad_enabled() or id(module) not in self._names:
            return
        first = next((value for value in args if isinstance(value, Tensor)), None)
        shape = tuple(first.shape) if first is not None else None
        self.calls[-1].append((self._names[id(module)], shape))
        if id(module) in self._blocks and shape is not None and len(shape) == 3:
            self.lengths[-1].add(shape[1])
        if len(self.calls) == 1 and isinstance(output, Tensor):
            self.outputs.append((self._names[id(module)], checksum(output)))
        if module is self._model and isinstance(output, Tensor):
            self._logits = output.detach()

    def _keep(self, tensor: Tensor) -> Tensor:
        self._held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def _compare_weights(self, model: LightningModule) -> None:
        """Whether weights are what the last step left, or what they were made with."""
        before = self.initial if self._after is None else self._after
        now = _weights(model)
        self.outside += [name for name, value in before.items() if now.get(name, value) != value]
        if self._after is not None:
            self._after = now

    def _hook(self, trainer: Trainer, model: LightningModule) -> None:
        for weight in model.parameters():
            if weight.requires_grad and not any(weight is other for other in self._hooked):
                weight.register_post_accumulate_grad_hook(self._accumulated)
                self._hooked.append(weight)
        for optimizer in trainer.optimizers:
            self.follow(optimizer)
        if self._state is not None:
            now = _state(trainer.optimizers)
            self.outside_state += [name for name, value in now.items() if self._state.get(name) != value]

    def follow(self, optimizer: Any) -> None:
        if hasattr(optimizer, "register_step_post_hook") and not any(optimizer is other for other in self._hooked):
            optimizer.register_step_post_hook(self._stepped_by)
            self._hooked.append(optimizer)

    def _accumulated(self, weight: Tensor) -> None:
        if weight not in self._first:
            self._first[weight] = weight.grad.detach().clone()

    def _stepped_by(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._stepped:  # one inside of another: the innermost is through first
            return
        self._stepped = True
        self.gradients += sum(
            weight.grad is not None and not torch.equal(weight.grad, first) for weight, first in self._first.items()
        )
        self._after = _weights(self._model)
        self._state = _state(self._model.trainer.optimizers)
        if self.optimizer is None:
            optimizers = self._model.trainer.optimizers
            self.optimizer = [
                (
                    type(one).__qualname__,
                    [{k: v for k, v in group.items() if k in _SETTINGS} for group in one.param_groups],
                )
                for one in optimizers
            ]
            self.state_form = {
                str(sorted((key, str(getattr(value, "dtype", ""))) for key, value in state.items()))
                for one in optimizers
                for state in one.state.values()
            }

    def __deepcopy__(self, memo: Any) -> _Watch:
        return self  # a technique that copies the model is watched no further


_SETTINGS = (
    "betas",
    "eps",
    "weight_decay",
    "momentum",
    "dampening",
    "nesterov",
    "amsgrad",
    "maximize",
    "fused",
    "foreach",
)


class _AttentionCalls(TorchFunctionMode):
    """Takes down the kinds of attention that are computed: function, causal or not, with or without a mask."""

    def __init__(self, found: set[Any]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if "attention" in name and torch.is_grad_enabled():
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            self.found.add((name, bool(kwargs.get("is_causal", False)), mask is not None))
        return func(*args, **kwargs)


def _probed(model: type[LightningModule], watch: _Watch) -> LightningModule:
    """A model of the kit that shows its user's methods to a watch."""

    class Data(model.dataset):
        def __getitem__(self, index: int) -> Any:
            sample = super().__getitem__(index)
            watch.known.add(checksum(list(sample)))
            return sample

    class Probed(model):
        dataset = Data

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            if self.trainer.training:
                watch.raw(batch)
            return super().on_before_batch_transfer(batch, dataloader_idx)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            watch.given(self, batch)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            watch.validating(self)
            super().validation_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            made = super().configure_optimizers()
            watch.follow(made["optimizer"])
            return made

    Probed.__name__ = model.__name__
    return Probed()


def _rows(batch: Any) -> int:
    return len(batch[0])


def _checksums(batch: Any) -> list[int]:
    """Of each row; parts that are not divided into rows count as a whole."""
    rows = _rows(batch)
    return [checksum([part[i] if len(part) == rows else part for part in batch]) for i in range(rows)]


def _weights(model: nn.Module) -> dict[str, int]:
    return {name: checksum(weight) for name, weight in model.named_parameters()}


def _state(optimizers: list[Any]) -> dict[Any, Any]:
    return {
        (id(weight), key): checksum(value)
        for one in optimizers
        for weight, state in one.state.items()
        if isinstance(state, dict)
        for key, value in state.items()
    }


def _rounded(model: nn.Module) -> set[str]:
    """Linear layers whose output is not that of their weights in full precision."""
    found = set()
    for name, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        sharded = hasattr(weight, "to_local")
        if isinstance(layer, nn.Linear) and isinstance(weight, Tensor) and weight.ndim == 2 and not sharded:
            x = torch.linspace(-1, 1, 4 * weight.shape[1]).view(4, -1).to(weight.dtype)
            with torch.no_grad():
                try:
                    same = torch.equal(layer(x), F.linear(x, weight, layer.bias))
                except Exception:  # one that only takes what a step gives it
                    continue
            if not same:
                found.add(name)
    return found


def _hidden(plain: _Watch, own: _Watch) -> str:
    for number, (before, now) in enumerate(zip(plain.calls, own.calls, strict=False)):
        if before != now:
            return f"other calls of modules, or other shapes, in step {number}"
    return "other values in the first step" if plain.outputs != own.outputs else ""


def _steps_with(own: _Watch, differs: Callable[[float | None, float], bool]) -> int:
    return sum(differs(plain, trained) for plain, trained in own.losses)


def _said(found: Any, words: str) -> str:
    return words if found else ""


def _of(watch: _Watch, part: str) -> list[Any]:
    return [step.get(part) for step in watch.trace.values()]


def _same_trace(plain: _Watch, own: _Watch, part: str) -> bool:
    pairs = list(zip(_of(plain, part), _of(own, part), strict=False))
    return all(before == now for before, now in pairs)


_CHANGED: dict[str, Callable[[_Watch, _Watch], str]] = {
    "samples": lambda plain, own: _said(plain.samples != own.samples, "other samples, or another order"),
    "batch content": lambda _, own: _said(own.foreign_rows, f"{own.foreign_rows} rows that the data do not hold"),
    "batch subset": lambda _, own: _said(own.fewer_rows, f"fewer samples in {own.fewer_rows} steps"),
    "module tree": lambda plain, own: _said(
        any(now != plain.trees[0] for now in own.trees), "other modules, or other names or shapes of weights"
    ),
    "attention": lambda plain, own: _said(plain.attention != own.attention, f"{own.attention} for {plain.attention}"),
    "precision": lambda plain, own: _said(
        own.rounded - plain.rounded, f"{len(own.rounded)} linear layers give other values"
    ),
    "requires_grad": lambda plain, own: _said(not _same_trace(plain, own, "frozen"), "other weights are frozen"),
    "weights": lambda _, own: _said(own.outside, f"{len(set(own.outside))} weights changed other than by a step"),
    "tokens": lambda plain, own: _said(plain.lengths[0] != set().union(*own.lengths), "blocks see other lengths"),
    "hidden states": _hidden,
    "saved tensors": lambda plain, own: _said(
        plain.saved != own.saved, f"{own.saved} bytes kept for backward, and {plain.saved} without it"
    ),
    "optimizer": lambda plain, own: _said(plain.optimizer != own.optimizer, "another class, or other settings"),
    "optimizer state": lambda plain, own: _said(
        own.outside_state or plain.state_form != own.state_form, "changed other than by a step, or of another form"
    ),
    "loss": lambda _, own: _said(
        _steps_with(own, lambda plain, trained: plain is None or abs(plain - trained) > 1e-5),
        "the loss trained on is not that of what the model gave",
    ),
    "gradients": lambda _, own: _said(own.gradients, "stepped by others than backward gave"),
    "learning rate": lambda plain, own: _said(not _same_trace(plain, own, "learning rate"), "other learning rates"),
    "weights-at-eval": lambda _, own: _said(own.at_eval, f"other weights in {own.at_eval} validation steps"),
}

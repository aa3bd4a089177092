"""FP8: the linear layers of any model multiply 8-bit numbers; weights, optimizer and everything else stay as they are.

What multiplies them is chosen by what the machine has: NVIDIA's Transformer Engine, torchao's float8, or the emulation
of :mod:`eke_fp8.arithmetic`, which saves nothing and shows the same numbers anywhere.

Source: Micikevicius, Stosic, Burgess, Cornea, Dubey, Grisenthwaite, Ha, Heinecke, Judd, Kamalu, Mellempudi, Oberman,
Shoeybi, Siu, Wu, "FP8 Formats for Deep Learning", 2022, https://arxiv.org/abs/2209.05433. Survey section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from eke import Run, Technique, TechniqueCallback, in_run
from eke.seams.blocks import BlocksError, find_all_blocks
from eke.seams.layers import is_conv1d, restore, swap, swapped
from eke.seams.linear import features
from eke.seams.names import NamesError, match, plain, plain_keys
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import TransformerEnginePrecision
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from eke_fp8.arithmetic import RECIPES, Arithmetic, emulate, round_to
from eke_fp8.entry import RECORD
from eke_fp8.hardware import SERVES, FP8Error, TEState, pick, te_autocast, te_linear, torchao_linear


@dataclass
class Choice:
    """Which layers are converted, by dotted name; and why others are not."""

    taken: list[str]
    left: dict[str, str]


def choose(
    module: nn.Module,
    layers: str | list[str] | None = None,
    keep: list[str] = (),
    smallest: int = 16,
    multiple: int = 16,
    conv1d: bool = True,
) -> Choice:
    """Choose the linear layers of a model that are to be converted.

    Args:
        module: Any.
        layers: Patterns of dotted names, as in ``"*.mlp.*"``. None takes those inside of the repeated blocks; in a
            model without, all but the first and the last.
        keep: Patterns of names that stay as they are.
        smallest: Fewest inputs and outputs.
        multiple: Of which both have to be one: 16 is what the hardware multiplies.
        conv1d: Whether Hugging Face's ``Conv1D`` (GPT-2's) is converted, too.

    Raises:
        NamesError: a pattern that meets no linear layer.
    """
    linear = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear) or is_conv1d(part)}
    linear = plain_keys(linear)
    others = {
        plain(name): "a MultiheadAttention, which computes with its weights alone"
        for name, part in module.named_modules()
        if isinstance(part, nn.MultiheadAttention)
    }
    if layers is not None:
        wanted, why = set(match(linear, layers, "layers")), "not among layers"
    else:
        try:
            lists = [plain(blocks.path) for blocks in find_all_blocks(module)]
            paths = tuple(f"{path}." if path else "" for path in lists)  # a model may be its list of blocks
            wanted, why = {name for name in linear if name.startswith(paths)}, "outside of the blocks"
        except BlocksError:
            wanted, why = set(list(linear)[1:-1]), "the first or the last"
    kept = set(match(linear, keep, "keep")) if keep else set()
    choice = Choice([], others)
    for name, part in linear.items():
        sizes = features(part)
        if name not in wanted:
            choice.left[name] = why
        elif name in kept:
            choice.left[name] = "to be kept"
        elif type(part) is not nn.Linear and not is_conv1d(part):
            choice.left[name] = f"a {type(part).__name__}, which is no plain nn.Linear"
        elif is_conv1d(part) and not conv1d:
            choice.left[name] = "a Conv1D, which Transformer Engine does not multiply"
        elif any(size % multiple for size in sizes):
            choice.left[name] = f"{sizes[0]} by {sizes[1]} features, no multiples of {multiple}"
        elif min(sizes) < smallest:
            choice.left[name] = f"{sizes[0]} by {sizes[1]} features, fewer than {smallest}"
        else:
            choice.taken.append(name)
    return choice


class FP8(TechniqueCallback):
    """Multiply in FP8 in the linear layers. Give it to ``callbacks=``; the Trainer's ``precision`` stays free, and is
    best ``"bf16-mixed"`` or ``"bf16-true"``.

    Example::

        trainer = Trainer(precision="bf16-mixed", callbacks=[FP8()])

    Args:
        recipe: How numbers are scaled before they are rounded. ``"tensorwise"``: each tensor by its largest number.
            ``"delayed"``: by the largest of the last steps. ``"rowwise"``: each row by its own;
            ``"rowwise_with_gw_hp"`` leaves the gradient of the weights as it is. ``"block"``: parts of 128, of weights
            128 by 128. ``"mx"``: parts of 32. In the emulation alone: ``"s2fp8"`` and ``"chunked"``, the methods of
            2020 and 2018.
        backend: ``"te"``, ``"torchao"``, ``"emulation"``, or ``"auto"``: the first of them that the machine has.
        layers: Patterns of dotted names of the layers. By default those in the blocks; in a model without, all but
            the first and the last.
        keep: Patterns of names that stay as they are.
        min_features: Fewest inputs and outputs of a layer: small products are slower in FP8 than in bf16.
        stochastic: Round gradients stochastically. In the emulation alone.
        history: Steps that ``"delayed"`` looks back on, 1024 by default.
        margin: Powers of two that ``"delayed"`` leaves free, 0 by default.

    Raises:
        FP8Error: an unknown word, or an option that another one makes void; hardware or packages that a demanded
            ``backend`` lacks; no layer to convert; Lightning's own precision plugin for Transformer Engine in the same
            Trainer.
    """

    technique: ClassVar[Technique] = RECORD
    may_change = ("backend",)
    must_not_change = ("recipe", "history")
    _module: LightningModule | None = in_run(None)  # in training, when its layers hold what is remembered
    _steps: int = in_run(0)

    def __init__(
        self,
        recipe: str = "tensorwise",
        *,
        backend: Literal["auto", "te", "torchao", "emulation"] = "auto",
        layers: str | list[str] | None = None,
        keep: list[str] | None = None,
        min_features: int = 16,
        stochastic: bool = False,
        history: int | None = None,
        margin: int | None = None,
    ) -> None:
        if recipe not in RECIPES:
            raise FP8Error(f"recipe={recipe!r}: give one of {', '.join(RECIPES)}.")
        if backend != "auto" and backend not in SERVES:
            raise FP8Error(f"backend={backend!r}: give 'auto' or one of {', '.join(SERVES)}.")
        if backend in SERVES and recipe not in SERVES[backend]:
            able = ", ".join(name for name, recipes in SERVES.items() if recipe in recipes)
            raise FP8Error(f"backend={backend!r} has no recipe {recipe!r}; {able} has.")
        if (history is not None or margin is not None) and recipe != "delayed":
            raise FP8Error(f"history and margin belong to recipe='delayed', and this is {recipe!r}.")
        if (history is not None and history < 1) or (margin or 0) < 0:
            raise FP8Error(f"history={history}, margin={margin}: give at least 1 and 0.")
        if stochastic and (backend != "emulation" or recipe == "s2fp8"):
            raise FP8Error("stochastic=True is the emulation's, for all recipes but 's2fp8': give backend='emulation'.")
        self.recipe, self.backend, self.layers, self.keep = recipe, backend, layers, list(keep or ())
        self.min_features, self.stochastic = min_features, stochastic
        self.history, self.margin = 1024 if history is None else history, margin or 0
        self._used, self._why = "", ""
        self._kept: dict[str, Any] = {}  # what layers remember, before training and after it

    def check(self, run: Run) -> None:
        if isinstance(run.trainer.precision_plugin, TransformerEnginePrecision):
            raise FP8Error(
                "The Trainer's precision is Lightning's Transformer Engine plugin, which converts layers too. Leave "
                "it out: "
                "FP8 needs no precision of its own, and precision='bf16-mixed' goes well with it."
            )
        self._used, self._why = pick(self.backend, self.recipe, run.device)
        self._kept = {}  # a new run; one that goes on gets its own back after this

    def on_this_machine(self) -> str:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return "by {} ({})".format(*pick(self.backend, self.recipe, device))

    def alter_model(self, run: Run) -> None:
        pl_module = run.module
        restore(pl_module, RECORD.name)  # a copy of a model in training comes with its layers
        multiple = 32 if self.recipe == "mx" else 16
        choice = choose(pl_module, self.layers, self.keep, self.min_features, multiple, conv1d=self._used != "te")
        if not choice.taken:
            raise FP8Error(
                f"{type(pl_module).__name__} has no linear layer for FP8. Left as they are: {_listed(choice.left)}. "
                f"{self._advice(pl_module, multiple)}"
            )
        self._announce(choice, pl_module.device)
        swap(pl_module, choice.taken, self._build, RECORD.name)

    def _advice(self, module: nn.Module, multiple: int) -> str:
        """What can be done where no layer is converted: name one that could be, if there is any."""
        try:
            able = choose(module, "*", self.keep, self.min_features, multiple, conv1d=self._used != "te").taken
        except NamesError:
            able = []
        if not able:
            return "None of them can be converted: leave FP8 out of this run."
        return f"Name those that are to be converted, such as FP8(layers={able[:1]!r})."

    def _build(self, layer: nn.Module) -> nn.Module:
        if self._used == "emulation":
            generator = self.generator if self.stochastic else None
            return emulate(layer, Arithmetic(self.recipe, generator, self.history, self.margin))
        build = torchao_linear(self.recipe) if self._used == "torchao" else te_linear()
        return build(layer)

    def _announce(self, choice: Choice, device: torch.device) -> None:
        text = f"FP8: {len(choice.taken)} linear layers, recipe {self.recipe}, by {self._used} ({self._why})."
        if choice.left:
            text += f" Left as they are: {_listed(choice.left)}."
        if self._used == "emulation" and self.backend == "auto" and device.type == "cuda":
            rank_zero_warn(f"{text} This is slower than no FP8 at all.")
        else:
            rank_zero_info(text)

    def end_run(self, run: Run) -> None:
        if self._module is not None:
            self._kept = self._memory(run.module)
        restore(run.module, RECORD.name)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._module, self._steps = pl_module, self.progress.steps
        for name, layer in self._with_memory(pl_module).items():
            if name in self._kept:
                layer.load_state_dict(self._kept[name])

    def around_step(self, run: Run, call_next: Callable[..., Any], batch: Any, *args: Any) -> Any:
        if self._used != "te":
            return call_next(batch, *args)
        with te_autocast(self.recipe, self.history, self.margin):
            return call_next(batch, *args)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._used != "emulation":
            return
        if self.recipe == "delayed":
            self._update(trainer, pl_module)
        if self.recipe == "chunked" and self.progress.steps > self._steps:
            self._steps = self.progress.steps
            self._round_weights(pl_module)

    def _update(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = list(self._with_memory(pl_module).values())
        seen = torch.stack([layer.seen.to(pl_module.device) for layer in layers])
        seen = seen.masked_fill(seen.isnan(), torch.inf)  # a maximum over processes may lose a NaN
        if trainer.world_size > 1:
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
        for layer, largest in zip(layers, seen, strict=True):
            layer.update(largest)

    @torch.no_grad()
    def _round_weights(self, pl_module: LightningModule) -> None:
        for layer in swapped(pl_module, RECORD.name).values():
            for weight in layer.parameters():
                if not weight.requires_grad:
                    continue  # what nothing updates is not rounded again, and may be left out of checkpoints
                uniform = torch.rand(weight.shape, generator=self.generator).to(weight.device)
                weight.copy_(round_to(weight.float(), 9, -30, uniform))

    def _with_memory(self, pl_module: LightningModule) -> dict[str, Any]:
        """Layers that remember something, by name."""
        if self._used == "te":
            return {name: TEState(layer) for name, layer in swapped(pl_module, RECORD.name).items()}
        if self._used != "emulation" or self.recipe != "delayed":
            return {}
        return {name: layer.eke_fp8 for name, layer in swapped(pl_module, RECORD.name).items()}

    def _memory(self, pl_module: LightningModule) -> dict[str, Any]:
        return {name: layer.state_dict() for name, layer in self._with_memory(pl_module).items()}

    def state_dict(self) -> dict[str, Any]:
        return {"layers": self._kept if self._module is None else self._memory(self._module)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept = state["layers"]


def _listed(left: dict[str, str]) -> str:
    """Names that share a reason together, numbers in them left open: ``blocks.*.fc1``."""
    by_reason: dict[str, list[str]] = {}
    for name, why in left.items():
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        if pattern not in by_reason.setdefault(why, []):
            by_reason[why].append(pattern)
    return "; ".join(f"{_some(names)}: {why}" for why, names in by_reason.items()) or "none"


def _some(names: list[str], show: int = 2) -> str:
    return ", ".join(names) if len(names) <= show else f"{', '.join(names[:show])} and {len(names) - show} more"

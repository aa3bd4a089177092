"""Exchange the Adam or AdamW that ``configure_optimizers`` returns for its twin with 8-bit states.

Source: Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise Quantization", ICLR 2022,
https://arxiv.org/abs/2110.02861. Our own back end is in ``optimizer.py``.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from eke import NoEffectWarning, Run, TechniqueCallback
from eke.quiet import importing
from eke.seams.names import NamesError, match_parameters
from eke.strategies import imposed
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from eke_adam8bit.entry import RECORD
from eke_adam8bit.optimizer import Adam8bitError, AdamW8bit, compiled, refuse_settings

BACKENDS = ("auto", "torch", "bitsandbytes", "torchao")


def eight_bit(
    optimizer: Optimizer,
    *,
    keep_32bit: Iterable[Tensor] = (),
    backend: str = "torch",
    min_elements: int = 4096,
    compile: bool = True,
) -> Optimizer:
    """Build the 8-bit twin of an Adam or AdamW: same groups, same settings, same parameters.

    Args:
        optimizer: ``torch.optim.Adam`` or ``torch.optim.AdamW``. State that it holds already is quantized
            (back end ``"torch"`` only).
        keep_32bit: Parameters whose states stay in 32 bits. Embeddings belong here.
        backend: ``"torch"``, ``"bitsandbytes"`` or ``"torchao"``.
        min_elements: Smaller tensors stay in 32 bits.
        compile: Compile the step of back end ``"torch"``.

    Returns:
        An optimizer of the back end. ``optimizer`` is left as it was; schedulers built with it still point there.

    Raises:
        Adam8bitError: an optimizer of another class, a setting that the back end does not have.
        ImportError: the back end is not installed.
    """
    _one_of_ours(backend)
    if type(optimizer) not in (Adam, AdamW):
        raise Adam8bitError(
            f"{type(optimizer).__name__} has no 8-bit twin: torch.optim.Adam and torch.optim.AdamW have one. "
            "Return one of these from configure_optimizers, or leave Adam8bit out."
        )
    for group in optimizer.param_groups:
        refuse_settings(group, type(optimizer).__name__)
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    if backend != "torch":
        if optimizer.state:
            raise Adam8bitError(f"the optimizer has taken steps, and backend={backend!r} cannot take its state over.")
        return _BUILD[backend](groups, list(keep_32bit), min_elements)
    twin = AdamW8bit(groups, keep_32bit=keep_32bit, min_elements=min_elements, compile=compile)
    if optimizer.state:
        twin.load_state_dict(optimizer.state_dict())
    return twin


def embeddings(root: nn.Module) -> list[Tensor]:
    """Weights of every ``nn.Embedding`` and ``nn.EmbeddingBag``, also where they serve as output layer too."""
    return [module.weight for module in root.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]


class Adam8bit(TechniqueCallback):
    """Train with 8-bit optimizer states: 2.06 bytes per parameter in place of 8.

    Example::

        trainer = Trainer(callbacks=[Adam8bit()])

    Args:
        keep_32bit: Names of further parameters whose states stay in 32 bits, such as ``"head.*"``. Weights of
            ``nn.Embedding`` always do.
        backend: ``"torch"`` is our own, for any device. ``"bitsandbytes"`` and ``"torchao"`` are those libraries'
            optimizers. ``"auto"`` takes torchao for parameters sharded by FSDP2, bitsandbytes on CUDA where it is
            installed, and else our own. It is said at the start which one.
        min_elements: Smaller tensors stay in 32 bits.
        compile: Compile the step of back end ``"torch"``. Takes seconds, once per process.

    Raises:
        Adam8bitError: an unknown ``backend``; an optimizer or a setting that has no 8-bit twin; a strategy whose
            checkpoints would not hold the states; a name in ``keep_32bit`` that no parameter has; a checkpoint of
            another back end.

    Warns:
        NoEffectWarning: no tensor of the optimizer is large enough. It is left as it is.
    """

    technique = RECORD
    may_change = ("backend", "compile")
    joins = True  # it reads the 32-bit states of Adam
    must_not_change = ("keep_32bit", "min_elements")

    def __init__(
        self,
        *,
        keep_32bit: Sequence[str] = (),
        backend: str = "auto",
        min_elements: int = 4096,
        compile: bool = True,
    ) -> None:
        _one_of_ours(backend)
        self.keep_32bit = [keep_32bit] if isinstance(keep_32bit, str) else list(keep_32bit)
        self.backend = backend
        self.min_elements = min_elements
        self.compile = compile
        self._chosen = ""

    def check(self, run: Run) -> None:
        self._chosen = choose(self.backend, run.trainer.strategy) if run.fitting else ""

    def alter_optimizer(self, run: Run, optimizer: Optimizer) -> Optimizer:
        keep = self._kept(run.module)
        twin = eight_bit(
            optimizer, keep_32bit=keep, backend=self._chosen, min_elements=self.min_elements, compile=self.compile
        )
        rule = AdamW8bit([nn.Parameter(torch.empty(0))], keep_32bit=keep, min_elements=self.min_elements).quantizes
        everything = [p for group in optimizer.param_groups for p in group["params"]]
        quantized = [p for p in everything if rule(p)]
        if not quantized:
            largest = max((p.numel() for p in everything), default=0)
            warnings.warn(
                f"Adam8bit finds no tensor of {self.min_elements} or more elements outside embeddings and "
                f"keep_32bit; the largest of {len(everything)} has {largest}. {type(optimizer).__name__} stays.",
                NoEffectWarning,
                stacklevel=2,
            )
            return optimizer
        rank_zero_info(self._summary(optimizer, quantized, everything))
        return twin

    def state_dict(self) -> dict[str, Any]:
        return {"backend": self._chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = state["backend"]
        if saved and self._chosen and saved != self._chosen:
            raise Adam8bitError(
                f"the checkpoint holds optimizer states of back end {saved!r}, and this run uses {self._chosen!r}. "
                f"Give Adam8bit(backend={saved!r})."
            )

    def _kept(self, module: LightningModule) -> list[Tensor]:
        try:
            chosen = match_parameters(module, self.keep_32bit, "keep_32bit")
        except NamesError as error:
            raise Adam8bitError(str(error)) from None
        return [*embeddings(module), *chosen.values()]

    def _summary(self, optimizer: Optimizer, quantized: list[Tensor], everything: list[Tensor]) -> str:
        how = ""
        if self._chosen == "torch":
            sample = quantized[0]
            how = f" ({compiled(sample.device.type, sample.dtype, False)[1] if self.compile else 'not compiled'})"
        count, total = sum(p.numel() for p in quantized), sum(p.numel() for p in everything)
        return (
            f"Adam8bit: {type(optimizer).__name__} keeps the states of {len(quantized)} of {len(everything)} tensors, "
            f"{count:,} of {total:,} parameters, in 8 bits; back end {self._chosen}{how}."
        )


def choose(backend: str, strategy: Strategy) -> str:
    """The back end that serves a strategy.

    Raises:
        Adam8bitError: the one that does is not installed.
    """
    if "sharded parameters" in imposed(strategy):
        if not _installed("torchao"):
            raise Adam8bitError(
                f"{type(strategy).__name__} shards each parameter, which only back end 'torchao' can follow, and "
                "torchao is not installed: pip install 'eke-adam8bit[torchao]'."
            )
        return "torchao"
    on_cuda = strategy.root_device.type == "cuda"
    if backend == "auto":
        return "bitsandbytes" if on_cuda and _installed("bitsandbytes") else "torch"
    if backend == "bitsandbytes" and not on_cuda:
        warnings.warn(
            "bitsandbytes on CPU takes about fifty times as long as torch's fused AdamW, and moves weights whose "
            "gradient is zero. Give backend='torch'.",
            stacklevel=2,
        )
    return backend


def _bitsandbytes(groups: list[dict[str, Any]], keep: list[Tensor], min_elements: int) -> Optimizer:
    _need("bitsandbytes")
    with importing():
        import bitsandbytes
        from bitsandbytes.optim import GlobalOptimManager

    for group in groups:
        if group["maximize"] or (group["weight_decay"] and not _decoupled(group)):
            raise Adam8bitError(
                "bitsandbytes has neither maximize nor weight decay that is added to the gradient, as Adam's is. "
                "Give backend='torch', or use AdamW."
            )
    optimizer = bitsandbytes.optim.AdamW8bit(groups, min_8bit_size=min_elements)
    # Its list of exceptions is one for the whole process, by id of parameters that may be long gone: take a fresh one.
    manager = object.__new__(GlobalOptimManager)
    manager.initialize()
    manager.override_config(keep, "optim_bits", 32)
    optimizer.mng = manager
    return optimizer


def _torchao(groups: list[dict[str, Any]], keep: list[Tensor], min_elements: int) -> Optimizer:
    _need("torchao")
    with importing():
        from torchao import optim

    if any(group["maximize"] for group in groups):
        raise Adam8bitError("torchao has no maximize. Give backend='torch'.")
    if len({_decoupled(group) for group in groups}) > 1:
        raise Adam8bitError("torchao's groups all decay as Adam's do or all as AdamW's. Give backend='torch'.")
    build = optim.AdamW8bit if _decoupled(groups[0]) else optim.Adam8bit
    optimizer = build(groups, lr=groups[0]["lr"], betas=groups[0]["betas"], eps=groups[0]["eps"])
    whole: Callable[[Tensor, bool], Tensor] = optimizer._new_buffer

    def new_buffer(p: Tensor, signed: bool, kept: list[Tensor]) -> Tensor:
        small = p.numel() < min_elements or any(p is one for one in kept)
        return torch.zeros_like(p) if small else whole(p, signed)

    optimizer._new_buffer = partial(new_buffer, kept=keep)
    # A checkpoint holds plain tensors: torch reads no class of torchao's back until torchao has been imported.
    optimizer.register_state_dict_post_hook(lambda _, state: _each_state(state, _as_plain))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: _each_state(state, _as_torchaos))
    return optimizer


def _each_state(state: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    changed = {number: {key: change(value) for key, value in one.items()} for number, one in state["state"].items()}
    return {**state, "state": changed}


def _as_plain(value: Any) -> Any:
    from torchao.optim.subclass_8bit import OptimState8bit

    if not isinstance(value, OptimState8bit):  # a sharded one is torch's to save
        return value
    return {"codes": value.codes, "scale": value.scale, "qmap": value.qmap, "signed": value.signed}


def _as_torchaos(value: Any) -> Any:
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit(**value) if isinstance(value, dict) else value


_BUILD = {"bitsandbytes": _bitsandbytes, "torchao": _torchao}


def _decoupled(group: dict[str, Any]) -> bool:
    return group["decoupled_weight_decay"]


def _installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _need(library: str) -> None:
    if not _installed(library):
        raise ImportError(f"backend={library!r} is not installed: pip install 'eke-adam8bit[{library}]'.")


def _one_of_ours(backend: str) -> None:
    if backend not in BACKENDS:
        raise Adam8bitError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}.")

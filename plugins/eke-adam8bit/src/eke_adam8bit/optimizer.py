"""Adam with 8-bit states: each block of 128 values shares one scale, each value is one byte.

Source: Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise Quantization", ICLR 2022,
https://arxiv.org/abs/2110.02861, section 2. Two departures, measured in the README. The codes are linear, and the
second moment is stored as its square root. And the second moment is rounded up or down in turn, by a fixed sequence
of thresholds: it moves by 0.1 % a step, less than half the distance of two codes, so that rounding to the nearest
code leaves it where it is.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from eke import ArgumentError, EkeError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam

BLOCK = 128  # values that share a scale: 2 + 2 * 4 / 128 = 2.0625 bytes of state per parameter
CHUNK = 512  # blocks that the uncompiled path takes at once: they fit a core's second cache level
_TINY = 1e-30  # least scale, so that a block of zeros divides by something

_OPTIONS = {
    # Twice the arithmetic is cheaper here than writing both moments in 32 bits and reading them back.
    "realize_reads_threshold": 1000,
    "realize_opcount_threshold": 1000,
    "cpp.enable_floating_point_contract_flag": "fast",  # fused multiply-add
}


def decode(m8: Tensor, r8: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """First moment m and square root r of the second, (blocks, BLOCK) float32, from their codes.

    m = m8 * scale and r = (r8 + 1/2) * scale: m can be exactly 0, and r is 0 only where a whole block is, so that m / r
    never divides by a zero that rounding made.
    """
    return m8.float() * scales[0][:, None], (r8.float() + 0.5) * scales[1][:, None]


def encode(m: Tensor, v: Tensor, dither: Tensor | float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of both moments.

    Args:
        m: First moment, (blocks, BLOCK), float32.
        v: Second moment, likewise, not negative.
        dither: Added to the second moment's code before it is rounded, in [-0.5, 0.5). 0 rounds to the nearest code.

    Returns:
        Codes of m in -127..127 and of the root of v in 0..255, float32, and the two scales, (blocks,). What
        :func:`decode` gives back is off by at most half a code in m, and by at most one code in the root
        (half a code without dither).
    """
    m_scale = _row(m.abs().amax(1).clamp_min(_TINY) / 127)
    r_scale = _row(v.amax(1).sqrt().clamp_min(_TINY) / 255.5)
    m8 = torch.round(m * _row(1 / m_scale)[:, None])
    r8 = torch.floor((v.sqrt() * _row(1 / r_scale)[:, None] + dither).clamp_min(0))
    return m8, r8, m_scale, r_scale


def update(p: Tensor, g: Tensor, m8: Tensor, r8: Tensor, scales: Tensor, knobs: Tensor, coupled: bool) -> None:
    """One step of Adam on blocks of a parameter, in place.

    m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2,  p <- p - lr m^ / (sqrt(v^) + eps), where ^ is the
    correction for starting at zero. m and v are decoded, moved, used in 32 bits, and coded again.

    Args:
        p: Weights, (blocks, BLOCK), any floating dtype.
        g: Gradient, likewise.
        m8: Codes of the first moment, likewise, int8.
        r8: Codes of the second moment's root, likewise, uint8.
        scales: Of both, (2, blocks), float32.
        knobs: What :func:`_knobs` makes of the settings, (BLOCK + 9,), float32.
        coupled: Weight decay is added to the gradient (Adam); else it shrinks the weight (AdamW).
    """
    dither = knobs[:BLOCK]
    step_size, correction, eps, beta1, take1, beta2, take2, keep, l2 = knobs[BLOCK:].unbind()
    g = g.float()
    if coupled:
        g = g + l2 * p.float()
    m, r = decode(m8, r8, scales)
    m, v = beta1 * m + take1 * g, beta2 * (r * r) + take2 * (g * g)
    m_codes, r_codes, m_scale, r_scale = encode(m, v, dither)
    p.copy_(p.float() * keep - step_size * m / (v.sqrt() * correction + eps))
    m8.copy_(m_codes)
    r8.copy_(r_codes)
    scales[0].copy_(m_scale)
    scales[1].copy_(r_scale)


def _row(x: Tensor) -> Tensor:
    # Changes nothing, but has the compiler keep one value per block: otherwise it divides again for every element.
    return x.as_strided(x.shape, (1,))


def _chunked(p: Tensor, g: Tensor, m8: Tensor, r8: Tensor, scales: Tensor, knobs: Tensor, coupled: bool) -> None:
    """:func:`update` without a compiler, a cacheful at a time."""
    for start in range(0, len(p), CHUNK):
        rows = slice(start, start + CHUNK)
        update(p[rows], g[rows], m8[rows], r8[rows], scales[:, rows], knobs, coupled)


@lru_cache
def compiled(device: str, dtype: torch.dtype, coupled: bool) -> tuple[Callable[..., None], str]:
    """:func:`update` compiled for any number of blocks, and a sentence on how that went.

    One graph serves all shapes of a model. Where nothing can be compiled, the result is the uncompiled function.
    """
    start = time.perf_counter()
    for options in (_OPTIONS, None):  # another version of torch may not know all of them
        try:
            function = torch.compile(update, fullgraph=True, options=options)
            blocks = 8192  # the compiler plans its threads for this size
            p, g = (torch.zeros(blocks, BLOCK, dtype=dtype, device=device) for _ in range(2))
            m8, r8 = (torch.zeros(blocks, BLOCK, dtype=code, device=device) for code in (torch.int8, torch.uint8))
            scales = torch.zeros(2, blocks, device=device)
            for tensor in (p, g, m8, r8):
                torch._dynamo.mark_dynamic(tensor, 0)
            torch._dynamo.mark_dynamic(scales, 1)
            with torch.no_grad():
                function(p, g, m8, r8, scales, torch.zeros(BLOCK + 9, device=device), coupled)
            return function, f"compiled in {time.perf_counter() - start:.1f} s"
        except Exception as error:  # whatever a compiler may raise
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    warnings.warn(
        f"AdamW8bit could not compile its step ({reason}) and runs it uncompiled, several times slower. "
        "Install a C++ compiler (CPU) or Triton (GPU).",
        stacklevel=2,
    )
    return _chunked, "not compiled"


class SparseError(EkeError, RuntimeError):
    """A gradient that is sparse, as torch's optimizers refuse it."""


class Adam8bitError(EkeError, MisconfigurationException, ValueError):
    """An optimizer, a setting or a run that has no twin with 8-bit states."""


class AdamW8bit(Optimizer):
    """AdamW with 8-bit states; in place of ``torch.optim.AdamW`` in any loop.

    Example::

        optimizer = AdamW8bit(model.parameters(), lr=3e-4, weight_decay=0.1)

    Args:
        params: Parameters or groups, as for any torch optimizer.
        lr: Learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Share of a weight that decays in a step of learning rate 1.
        decoupled_weight_decay: False adds the decay to the gradient, as ``torch.optim.Adam`` does.
        maximize: Climb instead.
        keep_32bit: Parameters whose states stay in 32 bits, such as embeddings.
        min_elements: Smaller tensors stay in 32 bits: they are many and weigh nothing.
        compile: Compile the step, once per process. False runs it uncompiled, several times slower.

    Tensors that stay in 32 bits go through torch's own function, with the ``fused`` and ``foreach`` flags of their
    group; without flags, fused on a CPU. The state of a parameter is its own: ``step``, ``exp_avg_8bit``,
    ``exp_avg_sq_8bit`` and ``scales``. Loading the state of a 32-bit Adam quantizes it.

    Raises:
        ValueError: a setting that it does not have.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        keep_32bit: Iterable[Tensor] = (),
        min_elements: int = 4096,
        compile: bool = True,
    ) -> None:
        if not 0 <= betas[0] < 1 or not 0 <= betas[1] < 1:
            raise ArgumentError(f"betas={betas}: each is the share of a moment that a step keeps. Give two in [0, 1).")
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ArgumentError(f"lr={lr}, eps={eps}, weight_decay={weight_decay}: none may be negative.")
        self.kept = list(keep_32bit)
        self.min_elements = min_elements
        self.compile = compile
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            **{"amsgrad": False, "foreach": None, "fused": None, "capturable": False, "differentiable": False},
        }
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in ("kept", "min_elements", "compile")}
        return {**super().__getstate__(), **own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        refuse_settings({**self.defaults, **param_group}, type(self).__name__)
        super().add_param_group(param_group)

    def quantizes(self, p: Tensor) -> bool:
        """Whether the states of ``p`` take 8 bits."""
        return (
            p.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and p.numel() >= max(self.min_elements, 2 * BLOCK)
            and not any(p is kept for kept in self.kept)
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. ``closure``, if given, computes the loss and the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        knobs: dict[Any, Tensor] = {}
        for group in self.param_groups:
            in_32_bits = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(self._start(p, group))
                if "exp_avg" in state:
                    in_32_bits.append(p)
                else:
                    self._step_8bit(p, state, group, knobs)
            if in_32_bits:
                self._step_32bit(in_32_bits, group)
        return loss

    def _start(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if p.grad.is_sparse:
            raise SparseError("AdamW8bit takes no sparse gradients. Build the embedding with sparse=False.")
        if not self.quantizes(p):
            zeros = torch.zeros_like(p, dtype=_full(p.dtype), memory_format=torch.preserve_format)
            step = torch.zeros((), device=p.device if group["fused"] else "cpu")
            return {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        blocks = -(-p.numel() // BLOCK)
        return {
            "step": torch.zeros(()),
            "exp_avg_8bit": torch.zeros(blocks, BLOCK, dtype=torch.int8, device=p.device),
            "exp_avg_sq_8bit": torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=p.device),
            "scales": torch.zeros(2, blocks, device=p.device),
        }

    def _step_8bit(self, p: Tensor, state: dict[str, Tensor], group: dict[str, Any], knobs: dict[Any, Tensor]) -> None:
        state["step"] += 1
        step, coupled = int(state["step"]), bool(group["weight_decay"]) and not group["decoupled_weight_decay"]
        key = (id(group), step, p.device)
        if key not in knobs:
            knobs[key] = _knobs(step, group).to(p.device, non_blocking=True)
        function = compiled(p.device.type, p.dtype, coupled)[0] if self.compile else _chunked
        g = -p.grad if group["maximize"] else p.grad
        weights = _blocks(p)
        codes = state["exp_avg_8bit"], state["exp_avg_sq_8bit"], state["scales"]
        function(weights, _blocks(g), *codes, knobs[key], coupled)
        if weights.data_ptr() != p.data_ptr():
            p.copy_(weights.view(-1)[: p.numel()].view(p.shape))

    def _step_32bit(self, params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in params]
        grads = [p.grad.to(state["exp_avg"].dtype) for p, state in zip(params, states, strict=True)]
        weights = [p.to(grad.dtype) for p, grad in zip(params, grads, strict=True)]  # p itself where it has 32 bits
        fused = group["fused"]
        if fused is None and not group["foreach"]:
            fused = all(p.device.type == "cpu" and p.is_floating_point() for p in params)
        adam(
            weights,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=None if fused else group["foreach"],
            fused=fused or None,
            has_complex=any(p.is_complex() for p in params),
            decoupled_weight_decay=group["decoupled_weight_decay"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
        for p, weight in zip(params, weights, strict=True):
            if weight is not p:
                p.copy_(weight)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or the state of ``torch.optim.Adam`` or ``AdamW``, which is quantized.

        Raises:
            ValueError: state of another kind of optimizer.
        """
        for state in state_dict["state"].values():
            _check_state(state)
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(saved, own, strict=True):
            if state_dict["state"].get(key):
                # torch has cast every tensor to the parameter's dtype: codes and scales have to keep theirs.
                self.state[p] = self._adopt(p, state_dict["state"][key], self.state[p]["step"])

    def state_dict_32bit(self) -> dict[str, Any]:
        """State that ``torch.optim.Adam`` and ``AdamW`` can load: the way back."""
        given = self.state_dict()
        numbered = chain.from_iterable(group["params"] for group in given["param_groups"])
        params = dict(zip(numbered, chain.from_iterable(group["params"] for group in self.param_groups), strict=True))
        wide = {
            key: {"step": state["step"], **_widen(params[key], state)} if "scales" in state else state
            for key, state in given["state"].items()
        }
        return {**given, "state": wide}

    def _adopt(self, p: Tensor, saved: dict[str, Any], step: Tensor) -> dict[str, Tensor]:
        names = set(saved) - {"step"}
        state = {name: saved[name].to(p.device, copy=True) for name in sorted(names)}
        if "scales" in state and not self.quantizes(p):
            state = _widen(p, state)
        elif "exp_avg" in state and self.quantizes(p):
            m, v = (_blocks(state[name].float()) for name in ("exp_avg", "exp_avg_sq"))
            m8, r8, *scales = encode(m, v)
            state = {"exp_avg_8bit": m8.to(torch.int8), "exp_avg_sq_8bit": r8.to(torch.uint8)}
            state["scales"] = torch.stack(scales)
        elif "exp_avg" in state:
            state = {name: value.to(_full(p.dtype)) for name, value in state.items()}
        return {"step": step.clone(), **state}


def _widen(p: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The two moments of ``p`` in 32 bits."""
    m, r = decode(state["exp_avg_8bit"], state["exp_avg_sq_8bit"], state["scales"])
    m, v = (x.view(-1)[: p.numel()].view(p.shape).to(_full(p.dtype)) for x in (m, r * r))
    return {"exp_avg": m, "exp_avg_sq": v}


def _check_state(state: dict[str, Any]) -> None:
    names = set(state) - {"step"}
    if names not in (set(), {"exp_avg", "exp_avg_sq"}, {"exp_avg_8bit", "exp_avg_sq_8bit", "scales"}):
        raise Adam8bitError(
            f"AdamW8bit loads its own state and that of Adam and AdamW without amsgrad; this one holds "
            f"{', '.join(sorted(names))}. Start with a new optimizer."
        )


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes that an optimizer's state holds, scales and tables included, each storage once."""
    storages = {}
    for tensor in _tensors(optimizer.state.values()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def refuse_settings(group: dict[str, Any], who: str) -> None:
    """Refuse what an 8-bit Adam does not do.

    Raises:
        ValueError: naming each setting.
    """
    found = [name for name in ("amsgrad", "capturable", "differentiable") if group.get(name)]
    if found:
        raise Adam8bitError(
            f"{who} has {' and '.join(f'{name}=True' for name in found)}, which an 8-bit Adam does not do. "
            "Leave it out, or keep the 32-bit optimizer."
        )


def _knobs(step: int, group: dict[str, Any]) -> Tensor:
    """What a step needs to know, as one tensor: numbers that change must not be constants of a compiled graph."""
    (beta1, beta2), lr, decay = group["betas"], float(group["lr"]), group["weight_decay"]
    # Thresholds of the step: multiples of the golden ratio's fraction over the block, of the plastic number's over
    # the steps. Both are spread evenly whatever stretch one looks at, and known from the step: nothing to save.
    place = torch.arange(BLOCK, dtype=torch.float64) * 0.6180339887498949 + step * 0.7548776662466927
    rest = (
        lr / (1 - beta1**step),
        1 / math.sqrt(1 - beta2**step),
        group["eps"],
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        1 - lr * decay if group["decoupled_weight_decay"] else 1.0,
        decay,
    )
    return torch.cat([place.frac() - 0.5, torch.tensor(rest, dtype=torch.float64)]).float()


def _blocks(x: Tensor) -> Tensor:
    """``x`` as (blocks, BLOCK): a view where it is contiguous and comes out even, else a copy with zeros behind."""
    missing = -x.numel() % BLOCK
    if not missing and x.is_contiguous():
        return x.detach().view(-1, BLOCK)
    return torch.nn.functional.pad(x.detach().reshape(-1), (0, missing)).view(-1, BLOCK)


def _full(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, dict):
            yield from _tensors(value.values())
        elif hasattr(value, "to_local"):  # a DTensor: what this process holds
            yield from _tensors([value.to_local()])
        elif hasattr(value, "__tensor_flatten__"):  # a subclass that is made of tensors
            yield from _tensors(getattr(value, name) for name in value.__tensor_flatten__()[0])
        elif isinstance(value, Tensor):
            yield value

"""Where attention is in a model, and how another one takes its place.

Three ways in. A Hugging Face model has an interface of its own. A module that calls ``scaled_dot_product_attention`` is
caught while it runs. One that writes attention out is computed anew from its projections, if that gives the same
numbers: both are run on random input first, and a module that gives others is refused.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from eke.seams.blocks import Attention, BlocksError, find_attention
from eke.seams.wrap import Wrapper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from eke_attention.kernels import AttentionError, Call, sdpa

NAME = "eke"  # in Hugging Face's interface
_HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "heads")
_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_TORCH = tuple(inspect.signature(F.multi_head_attention_forward).parameters)
Attend = Callable[["Site", Call], Tensor]


class Site:
    """One attention module whose calls go to ``attend``.

    Attributes:
        path: Dotted path of the module.
        how: ``"hugging face"``, ``"caught"`` or ``"rebuilt"``.
        layer: What a pattern keeps for this layer.
        calls: Made since the run began.
    """

    def __init__(self, path: str, module: nn.Module, how: str, attend: Attend) -> None:
        self.path, self.module, self.how, self.attend = path, module, how, attend
        self.layer: dict[str, Any] = {}
        self.wants_input = False
        self.calls = 0
        self._undo: list[Callable[[], Any]] = []

    def __call__(self, call: Call) -> Tensor:
        self.calls += 1
        return self.attend(self, call)

    def remove(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo = []

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copied module is a plain one


def install(module: nn.Module, attend: Attend) -> tuple[list[Site], dict[str, str]]:
    """Let ``attend`` compute the attention of a model.

    Returns:
        The sites, and the paths of attention that stays as it is with the reason.
    """
    sites: list[Site] = []
    left: dict[str, str] = {}
    hugging = {path: part for path, part in module.named_modules() if _is_hugging_face(part)}
    tops = {path: part for path, part in hugging.items() if not any(_inside(path, other) for other in hugging)}
    try:
        for path, part in tops.items():
            sites += _install_hugging_face(path, part, attend)
        for found in find_attention(module):
            if any(_inside(found.path, top) for top in tops):
                continue
            site, why = _install_one(found, attend)
            if site is None:
                left[found.path] = why
            else:
                sites.append(site)
    except BaseException:
        for site in sites:
            site.remove()
        raise
    return sites, left


def _inside(path: str, other: str) -> bool:
    return path != other and (other == "" or path.startswith(f"{other}."))


# ---------------------------------------------------------------------- Hugging Face


def _is_hugging_face(module: nn.Module) -> bool:
    return hasattr(module, "set_attn_implementation") and hasattr(module, "config")


def _install_hugging_face(path: str, model: nn.Module, attend: Attend) -> list[Site]:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, hugging_face_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(NAME)
    except Exception as error:
        raise AttentionError(
            f"{type(model).__name__} does not take another attention: {error}. It has to use transformers' attention "
            "interface, as the models in transformers 4.48 and later do."
        ) from error
    sites = []
    for found in find_attention(model):
        site = Site(f"{path}.{found.path}" if path else found.path, found.module, "hugging face", attend)
        vars(found.module)["eke_site"] = site
        hook = found.module.register_forward_pre_hook(partial(_note_input, site), with_kwargs=True)
        site._undo += [partial(vars(found.module).pop, "eke_site", None), hook.remove]
        sites.append(site)
    if not sites:
        raise AttentionError(f"{type(model).__name__} holds no attention that could be found.")
    sites[0]._undo.append(lambda: model.set_attn_implementation(before))
    return sites


def hugging_face_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; (batch, length, heads, size) comes back."""
    if "eke_site" not in vars(module):
        raise AttentionError(f"A {type(module).__name__} was not found when attention was replaced.")
    site = vars(module)["eke_site"] or sdpa  # a copy of a model in training has none
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise AttentionError(f"A {type(module).__name__} caps its scores or has sinks, which no kernel here does.")
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    return site(Call(query, key, value, attention_mask, causal, scaling, dropout)).transpose(1, 2).contiguous(), None


# ---------------------------------------------------------------------- modules


def _install_one(found: Attention, attend: Attend) -> tuple[Site | None, str]:
    site = Site(found.path, found.module, "caught", attend)
    calls = _calls_sdpa(found)
    if calls is False:
        rebuilt, why = _rebuild(found)
        if rebuilt is None:
            return None, why
        site.how = "rebuilt"
        wrapper = Wrapper(found.module, "forward", [partial(_run_rebuilt, site, rebuilt)])
    else:
        wrapper = Wrapper(found.module, "forward", [partial(_run_caught, site)])
    hook = found.module.register_forward_pre_hook(partial(_note_input, site), with_kwargs=True)
    site._undo += [wrapper.remove, hook.remove]
    return site, ""


@torch.compiler.disable  # what is caught while running cannot be compiled; the kernels need no compiling
def _run_caught(site: Site, call_next: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    before = site.calls
    with _Catch(site):
        output = call_next(*args, **kwargs)
    if site.calls == before:
        raise AttentionError(
            f"The attention at {site.path!r}, a {type(site.module).__name__}, ran without "
            "scaled_dot_product_attention: it would not have been replaced. torch's MultiheadAttention takes it with "
            "need_weights=False. Or name other modules by Attention(layers=...)."
        )
    return output


@torch.compiler.disable
def _run_rebuilt(site: Site, rebuilt: Callable[..., Any], call_next: Callable[..., Any], x: Tensor) -> Any:
    return rebuilt(x, site)


def _note_input(site: Site | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = args[0] if args else next((part for part in kwargs.values() if isinstance(part, Tensor)), None)
    # Any hook also keeps torch's encoder layers from computing attention without their module in evaluation.
    if site is not None and site.wants_input and isinstance(x, Tensor) and x.ndim == 3:
        first = not isinstance(module, nn.MultiheadAttention) or module.batch_first
        site.layer["input"] = (x if first else x.transpose(0, 1)).detach()


class _Catch(TorchFunctionMode):
    """Hands ``scaled_dot_product_attention`` to a site."""

    def __init__(self, site: Callable[[Call], Tensor]) -> None:
        super().__init__()
        self.site = site

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            given = {**dict(zip(_SDPA, args, strict=False)), **(kwargs or {})}
            query, key, value = given["query"], given["key"], given["value"]
            call = Call(
                *(part if part.ndim == 4 else part[:, None] for part in (query, key, value)),
                _four(given.get("attn_mask"), query.ndim),
                given.get("is_causal", False),
                given.get("scale"),
                given.get("dropout_p", 0.0),
            )
            found = self.site(call)
            return found if query.ndim == 4 else found[:, 0]
        if func is F.multi_head_attention_forward:
            given = dict(zip(_TORCH, args, strict=False)) | (kwargs or {})
            if _is_plain(given):
                return _torch_attention(self.site, given), None
        return func(*args, **(kwargs or {}))


def _is_plain(given: dict[str, Any]) -> bool:
    """No weights are asked for, and nothing is added to keys and values."""
    rare = ("bias_k", "bias_v", "static_k", "static_v")
    return not (
        given.get("need_weights", True)
        or given["add_zero_attn"]
        or given.get("use_separate_proj_weight")
        or any(given.get(name) is not None for name in rare)
        or given["query"].ndim != 3
    )


def _torch_attention(site: Callable[[Call], Tensor], given: dict[str, Any]) -> Tensor:
    """What ``multi_head_attention_forward`` computes: a mode is off inside of what it catches, and would not see it.

    (length, batch, width) in and out.
    """
    weights, biases = given["in_proj_weight"].chunk(3), (None,) * 3
    if given["in_proj_bias"] is not None:
        biases = given["in_proj_bias"].chunk(3)
    heads, mask, padding = given["num_heads"], given.get("attn_mask"), given.get("key_padding_mask")
    query, key, value = (
        F.linear(given[name], weight, bias).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True)
    )
    causal = bool(given.get("is_causal")) and padding is None
    if causal:
        mask = None  # it says the same
    if mask is not None:
        mask = mask.unflatten(0, (-1, heads)) if mask.ndim == 3 else mask[None, None]
    if padding is not None:
        padding = padding[:, None, None]
    both = [part for part in (mask, padding) if part is not None]
    if all(part.dtype == torch.bool for part in both):  # True forbids
        mask = ~(both[0] | both[-1]) if both else None
    else:
        mask = sum(
            torch.zeros(part.shape, dtype=query.dtype, device=part.device).masked_fill(part, -torch.inf)
            if part.dtype == torch.bool
            else part.to(query.dtype)
            for part in both
        )
    dropout = given["dropout_p"] if given.get("training", True) else 0.0
    output = site(Call(query, key, value, mask, causal, None, dropout))
    return F.linear(output.permute(2, 0, 1, 3).flatten(2), given["out_proj_weight"], given["out_proj_bias"])


def _four(mask: Tensor | None, ndim: int) -> Tensor | None:
    """A mask with a dimension each for batch, heads, queries and keys."""
    if mask is None:
        return None
    if ndim == 3 and mask.ndim == 3:
        return mask[:, None]
    return mask[(None,) * (4 - mask.ndim)]


@contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    """Evaluation without a graph, to try a module out."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def _sample(module: nn.Module) -> Tensor:
    weight = next(part for part in module.parameters() if part.ndim >= 2)
    width = next((getattr(module, name) for name in ("embed_dim", "hidden_size") if hasattr(module, name)), None)
    if width is None:
        first = next(part for part in module.modules() if hasattr(part, "in_features") or hasattr(part, "nx"))
        width = getattr(first, "in_features", None) or first.weight.shape[0]
    own = torch.Generator().manual_seed(0)
    return torch.randn(2, 8, width, generator=own).to(weight)


def _calls_sdpa(found: Attention) -> bool | None:
    """Whether a module calls ``scaled_dot_product_attention``; None if it needs more than one tensor to run."""
    if found.kind == "torch":
        return True
    seen = []

    def spy(call: Call) -> Tensor:
        seen.append(1)
        return F.scaled_dot_product_attention(*call[:4], 0.0, call.causal, scale=call.scale)

    try:
        with _quiet(found.module), _Catch(spy):
            found.module(_sample(found.module))
    except Exception:
        return None
    return bool(seen)


def _rebuild(found: Attention) -> tuple[Callable[..., Any] | None, str]:
    """Compute a module's output from its projections, if that gives its own numbers."""
    module = found.module
    heads = next((getattr(module, name) for name in _HEADS if isinstance(getattr(module, name, None), int)), None)
    try:
        inner = [found.projection(of) for of in ("q", "k", "v")]
    except BlocksError:
        return None, "it has no projections for queries, keys and values"
    outer = [
        child for child in module.children() if isinstance(child, nn.Linear) and all(child is not one for one in inner)
    ]
    if heads is None or len(outer) != 1:
        return None, "it names no number of heads, or has not one linear layer behind attention"
    drops = [child for name, child in module.named_children() if isinstance(child, nn.Dropout)]
    norms = {
        of: child for of in "qk" for name, child in module.named_children() if re.fullmatch(f"{of}_?(norm|ln)", name)
    }

    def compute(x: Tensor, site: Callable[[Call], Tensor], causal: bool, by_head: bool) -> Tensor:
        if found.kind == "fused":
            parts = inner[0](x)
            if by_head:  # each head's three one behind the other
                query, key, value = parts.unflatten(-1, (heads, 3, -1)).permute(3, 0, 2, 1, 4)
            else:
                query, key, value = parts.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            query, key, value = (one(x).unflatten(-1, (heads, -1)).transpose(1, 2) for one in inner)
        query = norms["q"](query) if "q" in norms else query
        key = norms["k"](key) if "k" in norms else key
        inside = drops[0].p if len(drops) > 1 and module.training else 0.0  # of the weights; the other is behind
        output = site(Call(query, key, value, None, causal, None, inside))
        output = outer[0](output.transpose(1, 2).flatten(2))
        return drops[-1](output) if drops else output

    def plain(call: Call) -> Tensor:
        return F.scaled_dot_product_attention(*call[:3], is_causal=call.causal)

    with _quiet(module):
        sample = _sample(module)
        wanted = module(sample)
        if not isinstance(wanted, Tensor):
            return None, "it returns more than a tensor"
        for causal in (False, True):
            for by_head in (False, True):
                try:
                    given = compute(sample, plain, causal, by_head)
                except RuntimeError:
                    continue
                if given.shape == wanted.shape and torch.allclose(given, wanted, rtol=1e-3, atol=1e-4):
                    return partial(_rebuilt, compute, causal, by_head), ""
    return None, "computed from its projections it gives other numbers than its own code"


def _rebuilt(
    compute: Callable[..., Tensor], causal: bool, by_head: bool, x: Tensor, site: Callable[[Call], Tensor]
) -> Tensor:
    return compute(x, site, causal, by_head)

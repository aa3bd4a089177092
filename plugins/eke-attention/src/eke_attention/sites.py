"""Where attention is in a model, and how another one takes its place.

Three ways in. A Hugging Face model has an interface of its own. A module that calls ``scaled_dot_product_attention`` is
caught while it runs. One that writes attention out is computed anew from its projections, if that gives the same
numbers: both are run on random input first, and a module that gives others is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from eke.seams.anatomy import AttentionSite, attention_sites, quiet
from eke.seams.blocks import Attention, BlocksError, find_attention
from eke.seams.sdpa import Call, Catch, sdpa
from eke.seams.wrap import Wrapper
from torch import Tensor, nn

from eke_attention.kernels import AttentionError

NAME = "eke"  # in Hugging Face's interface
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
        raise AttentionError(
            f"{type(model).__name__} holds no attention that could be found. Leave Attention out of this run."
        )
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
    with Catch(site):
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
        return sdpa(call)

    try:
        with quiet(found.module), Catch(spy):
            found.module(_sample(found.module))
    except Exception:
        return None
    return bool(seen)


def _rebuild(found: Attention) -> tuple[Callable[..., Any] | None, str]:
    """Compute a module's output from its projections, if that gives its own numbers."""
    module = found.module
    try:
        site = attention_sites(module)[0]
        layouts = [site, replace(site, by_head=True)] if found.kind == "fused" else [site]
        shape = {of: (heads, site.size) for of, heads in zip("qkv", (site.heads, *[site.key_heads] * 2), strict=True)}
    except (BlocksError, IndexError) as error:
        return None, str(error) or "it has no projections for queries, keys and values"
    if site.output is None:
        return None, "it has no layer behind attention"
    drops = [child for name, child in module.named_children() if isinstance(child, nn.Dropout)]
    norms = {
        of: child for of in "qk" for name, child in module.named_children() if re.fullmatch(f"{of}_?(norm|ln)", name)
    }

    def compute(x: Tensor, layout: AttentionSite, causal: bool, attend: Callable[[Call], Tensor]) -> Tensor:
        if found.kind == "fused":
            parts = layout.split(site.query.module(x))
        else:
            maps = zip((site.query, site.key, site.value), shape.values(), strict=True)
            parts = [one.module(x).unflatten(-1, sizes) for one, sizes in maps]
        query, key, value = (part.transpose(1, 2) for part in parts)
        query = norms["q"](query) if "q" in norms else query
        key = norms["k"](key) if "k" in norms else key
        inside = drops[0].p if len(drops) > 1 and module.training else 0.0  # of the weights; the other is behind
        output = attend(Call(query, key, value, None, causal, None, inside))
        output = site.output.module(output.transpose(1, 2).flatten(2))
        return drops[-1](output) if drops else output

    with quiet(module):
        sample = _sample(module)
        wanted = module(sample)
        if not isinstance(wanted, Tensor):
            return None, "it returns more than a tensor"
        for causal, layout in product((False, True), layouts):
            given = compute(sample, layout, causal, sdpa)
            if given.shape == wanted.shape and torch.allclose(given, wanted, rtol=1e-3, atol=1e-4):
                return partial(_rebuilt, compute, layout, causal), ""
    return None, "computed from its projections it gives other numbers than its own code"


def _rebuilt(
    compute: Callable[..., Tensor], layout: AttentionSite, causal: bool, x: Tensor, attend: Callable[[Call], Tensor]
) -> Tensor:
    return compute(x, layout, causal, attend)

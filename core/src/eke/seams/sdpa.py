"""Catch a model's attention while it runs: calls of ``scaled_dot_product_attention``, whoever makes them.

The tricks it hides: a function mode sees the call wherever it stands in the model's code; ``nn.MultiheadAttention``
makes it inside of a function that the mode catches first, and inside of what it catches a mode is off, so that this
function is computed here, from its weights; masks have three forms and two meanings of True.

Code that is compiled is not caught.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_TORCH = tuple(inspect.signature(F.multi_head_attention_forward).parameters)


class Call(NamedTuple):
    """One call of attention, as the model made it.

    Args:
        query: (batch, heads, queries, size).
        key, value: (batch, key heads, keys, size); fewer heads serve several of the query's each.
        mask: (batch or 1, heads or 1, queries, keys), bool where they may meet, or a number to add; or None.
        causal: Each query sees keys up to its own place.
        scale: Of the products.
        dropout: Share of the weights that are dropped.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    dropout: float = 0.0

    @property
    def factor(self) -> float:
        return 1 / math.sqrt(self.query.shape[-1]) if self.scale is None else self.scale


def sdpa(call: Call) -> Tensor:
    """``scaled_dot_product_attention``, which takes the best kernel that serves."""
    mask, causal = call.mask, call.causal
    if causal and mask is not None:  # which torch does not take together
        square = torch.ones(call.query.shape[2], call.key.shape[2], dtype=torch.bool, device=mask.device).tril()
        mask = mask & square if mask.dtype == torch.bool else mask.masked_fill(~square, -torch.inf)
        causal = False
    return F.scaled_dot_product_attention(
        call.query,
        call.key,
        call.value,
        attn_mask=mask,
        dropout_p=call.dropout,
        is_causal=causal,
        scale=call.scale,
        enable_gqa=call.query.shape[1] != call.key.shape[1],
    )


class Catch(TorchFunctionMode):
    """While it is entered, attention is computed by ``attend``.

    Args:
        attend: Gets each call and gives what attention would, (batch, heads, queries, size). To change a call and leave
            the rest to torch: ``lambda call: sdpa(call._replace(mask=...))``.
    """

    def __init__(self, attend: Callable[[Call], Tensor]) -> None:
        super().__init__()
        self.attend = attend

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
            found = self.attend(call)
            return found if query.ndim == 4 else found[:, 0]
        if func is F.multi_head_attention_forward:
            given = dict(zip(_TORCH, args, strict=False)) | (kwargs or {})
            if _is_plain(given):
                return _torch_attention(self.attend, given), None
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


def _torch_attention(attend: Callable[[Call], Tensor], given: dict[str, Any]) -> Tensor:
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
    output = attend(Call(query, key, value, mask, causal, None, dropout))
    return F.linear(output.permute(2, 0, 1, 3).flatten(2), given["out_proj_weight"], given["out_proj_bias"])


def _four(mask: Tensor | None, ndim: int) -> Tensor | None:
    """A mask with a dimension each for batch, heads, queries and keys."""
    if mask is None:
        return None
    if ndim == 3 and mask.ndim == 3:
        return mask[:, None]
    return mask[(None,) * (4 - mask.ndim)]

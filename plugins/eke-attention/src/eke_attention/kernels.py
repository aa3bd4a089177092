"""What computes attention: torch's own kernels, FlexAttention, and gathered blocks.

All take queries, keys and values of shape (batch, heads, length, size). Sources: Dao, Fu, Ermon, Rudra, Re,
"FlashAttention", NeurIPS 2022, https://arxiv.org/abs/2205.14135; Dong, Feng, Guessous, Liang, He, "Flex Attention",
2024, https://arxiv.org/abs/2412.05496. Survey section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from eke import EkeError
from eke.seams.sdpa import Call, sdpa
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Mod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # batch, head, query, key, as numbers: may they meet?


class AttentionError(EkeError, ValueError):
    """Attention that cannot be replaced, or a kernel that cannot run here."""


def repeated(call: Call) -> Call:
    """With a key and a value for each head of the queries."""
    groups = call.query.shape[1] // call.key.shape[1]
    if groups == 1:
        return call
    return call._replace(key=call.key.repeat_interleave(groups, 1), value=call.value.repeat_interleave(groups, 1))


def scores(call: Call) -> Tensor:
    """What the softmax is taken of, (batch, heads, queries, keys), masked pairs being -inf."""
    call = repeated(call)
    found = call.query @ call.key.transpose(-1, -2) * call.factor
    if call.mask is not None:
        found = found.masked_fill(~call.mask, -torch.inf) if call.mask.dtype == torch.bool else found + call.mask
    if call.causal:
        size = found.shape[-2:]
        found = found.masked_fill(~torch.ones(size, dtype=torch.bool, device=found.device).tril(), -torch.inf)
    return found


def naive(call: Call) -> Tensor:
    """Attention as it is written down: the reference for all others. Queries that may meet nothing give zeros."""
    weights = scores(call).float().softmax(-1).nan_to_num(0.0).to(call.query.dtype)
    return F.dropout(weights, call.dropout) @ repeated(call).value


def _demanded(backend: SDPBackend) -> Callable[[Call], Tensor]:
    def kernel(call: Call) -> Tensor:
        with sdpa_kernel([backend]):
            return sdpa(call)

    return kernel


def flash_attn(call: Call) -> Tensor:
    """The flash-attn package: half precision on a GPU, causal or not, no mask."""
    from flash_attn import flash_attn_func

    if call.mask is not None:
        raise AttentionError("The flash-attn package takes no mask, and the model gives one. Take kernel='auto'.")
    swapped = (part.transpose(1, 2) for part in (call.query, call.key, call.value))
    found = flash_attn_func(*swapped, dropout_p=call.dropout, softmax_scale=call.scale, causal=call.causal)
    return found.transpose(1, 2)


KERNELS = {
    "naive": naive,
    "sdpa": sdpa,
    "flash": _demanded(SDPBackend.FLASH_ATTENTION),
    "cudnn": _demanded(SDPBackend.CUDNN_ATTENTION),
    "flash-attn": flash_attn,
}


def refusal(kernel: str, device: torch.device) -> str | None:
    """Why a kernel cannot run on a device, or None."""
    if kernel in ("cudnn", "flash-attn") and device.type != "cuda":
        return f"it needs a GPU, and this runs on the {device.type.upper()}"
    if kernel == "flash-attn" and find_spec("flash_attn") is None:
        return "the package is not installed: pip install 'eke-attention[flash]'"
    return None


# ---------------------------------------------------------------------- blocks


@dataclass(frozen=True)
class BlockPattern:
    """Which blocks of keys each block of queries meets, and which pairs in them.

    Args:
        size: Queries and keys of a block.
        ids: Numbers of the blocks of keys, (batch or 1, heads or 1, query blocks, most), int64; those that count first.
        counts: How many count, (batch or 1, heads or 1, query blocks).
        mod: Which pairs meet.
    """

    size: int
    ids: Tensor
    counts: Tensor
    mod: Mod

    @property
    def kept(self) -> float:
        """Share of all blocks that is computed."""
        return float(self.counts.double().mean()) / math.ceil(self.ids.shape[-2])


def grid(mod: Mod, batch: int, heads: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """The pattern pair by pair, (batch, heads, queries, keys), bool."""
    numbers = (torch.arange(size, device=device) for size in (batch, heads, queries, keys))
    b, h, q, k = (number.view([-1 if place == at else 1 for place in range(4)]) for at, number in enumerate(numbers))
    return mod(b, h, q, k).expand(batch, heads, queries, keys)


def block_pattern(
    mod: Mod, batch: int, heads: int, queries: int, keys: int, size: int, device: torch.device
) -> BlockPattern:
    """Find the blocks that hold any pair that meets. ``batch`` and ``heads`` are 1 where the pattern is the same."""
    pairs = grid(mod, batch, heads, queries, keys, device)
    padded = F.pad(pairs, (0, -keys % size, 0, -queries % size))
    tiles = padded.unflatten(3, (-1, size)).unflatten(2, (-1, size)).any(5).any(3)
    counts = tiles.sum(-1)
    order = tiles.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return BlockPattern(size, order[..., : max(1, int(counts.max()))], counts, mod)


def gathered(call: Call, pattern: BlockPattern) -> Tensor:
    """Attention of each block of queries to its own blocks of keys, by torch's kernel. It has a backward on any device.

    Pairs outside of the pattern do not exist; queries that meet nothing give zeros.
    """
    call = repeated(call)
    batch, heads, queries, width = call.query.shape
    keys, size, device = call.key.shape[2], pattern.size, call.query.device
    rows = F.pad(call.query, (0, 0, 0, -queries % size)).unflatten(2, (-1, size))  # (batch, heads, blocks, size, width)
    ids = pattern.ids.expand(batch, heads, -1, -1)
    numbers = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)

    def blocks(x: Tensor) -> Tensor:  # (batch, heads, blocks, most * size, width)
        x = F.pad(x, (0, 0, 0, -keys % size)).unflatten(2, (-1, size)).flatten(0, 1)
        return x[numbers, ids].flatten(3, 4)

    inner = torch.arange(size, device=device)
    q = (torch.arange(rows.shape[2], device=device)[:, None] * size + inner)[None, None, :, :, None]
    most = pattern.ids.shape[-1]
    k = (pattern.ids[..., None] * size + inner).flatten(-2)[:, :, :, None]  # (batch or 1, heads or 1, blocks, 1, pairs)
    counted = (torch.arange(most, device=device) < pattern.counts[..., None]).repeat_interleave(size, -1)[:, :, :, None]
    b = torch.arange(pattern.ids.shape[0], device=device).view(-1, 1, 1, 1, 1)
    h = torch.arange(pattern.ids.shape[1], device=device).view(1, -1, 1, 1, 1)
    # A number beyond the end may index what a mod looks up.
    meet = pattern.mod(b, h, q.clamp(max=queries - 1), k.clamp(max=keys - 1)) & counted & (k < keys)
    if call.causal:
        meet = meet & (k <= q)
    bias = None
    if call.mask is not None:
        wide = call.mask.expand(*call.mask.shape[:2], queries, keys)
        at = torch.arange(wide.shape[0], device=device).view(-1, 1, 1, 1, 1)
        head = torch.arange(wide.shape[1], device=device).view(1, -1, 1, 1, 1)
        found = wide[at, head, q.clamp(max=queries - 1), k.clamp(max=keys - 1)]
        meet, bias = (meet & found, None) if found.dtype == torch.bool else (meet, found)
    some = meet.any(-1, keepdim=True)
    # Finite, so that a query that meets nothing has no NaN in its gradient either.
    lowest = torch.finfo(rows.dtype).min / 4
    added = torch.zeros(meet.shape, dtype=rows.dtype, device=device).masked_fill(~meet, lowest)
    added = added if bias is None else added + bias.clamp(min=lowest).to(added)
    added = added.expand(batch, heads, *added.shape[2:]) if added.shape[:2] != (1, 1) else added
    found = F.scaled_dot_product_attention(
        rows.flatten(0, 1),
        blocks(call.key).flatten(0, 1),
        blocks(call.value).flatten(0, 1),
        attn_mask=added.flatten(0, 1),
        dropout_p=call.dropout,
        scale=call.scale,
    )
    found = found.unflatten(0, (batch, heads)) * some.to(found)
    return found.flatten(2, 3)[:, :, :queries]


def flex(call: Call, pattern: BlockPattern) -> Tensor:
    """FlexAttention on the pattern's blocks. On a CPU it has no backward, and is compiled nowhere but on a GPU."""
    from torch.nn.attention.flex_attention import BlockMask

    if call.mask is not None or call.dropout:
        what = "a mask of the model's own" if call.mask is not None else "dropout"
        raise AttentionError(f"FlexAttention does not take {what}, and there is one. Take kernel='gather'.")
    causal = call.causal
    queries, keys = call.query.shape[2], call.key.shape[2]

    def meet(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        one = torch.zeros_like(b)
        found = pattern.mod(b if pattern.ids.shape[0] > 1 else one, h if pattern.ids.shape[1] > 1 else one, q, k)
        return found & (k <= q) if causal else found

    columns = math.ceil(keys / pattern.size)
    indices = F.pad(pattern.ids, (0, columns - pattern.ids.shape[-1])).int()
    mask = BlockMask.from_kv_blocks(
        pattern.counts.int(), indices, BLOCK_SIZE=pattern.size, mask_mod=meet, seq_lengths=(queries, keys)
    )
    kernel = _compiled() if call.query.is_cuda else _flex()
    gqa = call.query.shape[1] != call.key.shape[1]
    return kernel(call.query, call.key, call.value, block_mask=mask, scale=call.scale, enable_gqa=gqa)


def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_flex())

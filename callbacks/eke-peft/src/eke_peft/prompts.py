"""Visual prompts. Source: Jia, Tang, Chen, Cardie, Belongie, Hariharan, Lim, "Visual Prompt Tuning", ECCV 2022,
https://arxiv.org/abs/2203.12119, section 3.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from eke.seams import interceptor
from torch import Tensor, nn
from torch.nn import functional as F

from eke_peft.errors import PEFTError

PROMPTS = "eke_prompts"


class Prompts(nn.Module):
    """Learned tokens: of the first block, or of each.

    Args:
        layers: 1, or the number of blocks.
        tokens: Of one block.
        width: Of a token.
        patch: Features of what a patch is made from, for the size of the first values.
        dropout: Of prompts, while training.
    """

    def __init__(self, layers: int, tokens: int, width: int, patch: int, dropout: float) -> None:
        super().__init__()
        bound = math.sqrt(6 / (patch + width))
        self.tokens = nn.Parameter(torch.empty(layers, tokens, width).uniform_(-bound, bound))
        self.dropout = dropout

    def of(self, layer: int) -> Tensor:
        return F.dropout(self.tokens[layer], self.dropout, self.training)


def token_width(block: nn.Module) -> int:
    """Of a token, by a block's LayerNorm.

    Raises:
        PEFTError: it has none.
    """
    norms = [part for part in block.modules() if isinstance(part, nn.LayerNorm)]
    if not norms:
        raise PEFTError(f"the width of a token is not to be seen from {type(block).__name__}, which has no LayerNorm.")
    return norms[0].normalized_shape[-1]


def patch_size(host: nn.Module) -> int:
    """Features of a patch: of the convolution that cuts an image, 3 x 16 x 16 where there is none."""
    found = next((part for part in host.modules() if isinstance(part, nn.Conv2d)), None)
    return found.weight[0].numel() if found is not None else 768


def put_prompts(prompts: Prompts, blocks: interceptor.InterceptedBlocks, prefix: int) -> None:
    """Let blocks see the prompts, behind the first ``prefix`` tokens, and nobody after the last block."""
    modules, count = blocks.now(), prompts.tokens.shape[1]
    for layer, block in enumerate(modules):
        before = after = None
        if layer == 0:
            before = partial(_insert, prompts, prefix)
        elif len(prompts.tokens) > 1:
            before = partial(_replace, prompts, layer, prefix)
        if layer == len(modules) - 1:
            after = partial(_remove, count, prefix)
        kind = First if layer == 0 else interceptor.Edit
        blocks.put(block, *([kind(before, after)] if before or after else []))


class First(interceptor.Edit):
    """At the entrance of the first block. What else blocks get for each token, prompts have none of."""

    def __call__(self, call_next: Any, hidden: Tensor, args: Any, kwargs: Any, form: interceptor.Form) -> Any:
        for name, value in [*((f"argument {i}", one) for i, one in enumerate(args, 1)), *kwargs.items()]:
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(part, Tensor) and hidden.shape[1] in part.shape[1:]:
                    raise PEFTError(
                        f"The blocks also get {name} of shape {tuple(part.shape)}, one entry a token, and prompts have "
                        "none. 'vpt' serves Vision Transformers; on a language model, 'prompt' or 'prefix' does."
                    )
        return super().__call__(call_next, hidden, args, kwargs, form)


def _insert(prompts: Prompts, prefix: int, hidden: Tensor) -> Tensor:
    return interceptor.insert_tokens(hidden, prompts.of(0), prefix)


def _replace(prompts: Prompts, layer: int, prefix: int, hidden: Tensor) -> Tensor:
    return interceptor.replace_tokens(hidden, prompts.of(layer), prefix)


def _remove(count: int, prefix: int, hidden: Tensor) -> Tensor:
    return torch.cat([hidden[:, :prefix], hidden[:, prefix + count :]], dim=1)

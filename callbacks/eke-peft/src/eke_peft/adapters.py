"""Bottleneck adapters. Source: Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe, Gesmundo, Attariyan, Gelly,
"Parameter-Efficient Transfer Learning for NLP", ICML 2019, https://arxiv.org/abs/1902.00751, section 2. Their up
projection starts at zero here, which makes the start exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from eke.seams.linear import features
from torch import Tensor, nn
from torch.nn import functional as F

ADAPTER = "eke_adapter"


class Adapter(nn.Module):
    """A bottleneck beside a layer's output, added to it. At the start it adds nothing."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(features, width), nn.Linear(width, features)
        nn.init.trunc_normal_(self.down.weight, std=1e-2)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.up(F.gelu(self.down(hidden.to(self.down.weight.dtype)))).to(hidden.dtype)


def _adapt(module: nn.Module, inputs: Any, output: Any) -> Any:
    adapter = getattr(module, ADAPTER)
    return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)


def put_adapters(host: nn.Module, names: Iterable[str], width: int) -> None:
    """Put a bottleneck behind each of these layers."""
    for name in names:
        layer = host.get_submodule(name)
        given = layer.embed_dim if isinstance(layer, nn.MultiheadAttention) else features(layer)[1]
        layer.add_module(ADAPTER, Adapter(given, width))
        layer.register_forward_hook(_adapt)

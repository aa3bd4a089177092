"""Which operators keep their results in a region that is recomputed.

Products of matrices take nearly all of a block's time; norms, GELU, dropout and residuals take bytes and hardly time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_mm", "_addmm_activation")
_ATTENTION = ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "flex_attention")


class Keep:
    """Keep the results of attention, of every ``products``-th product of matrices, or both.

    Args:
        attention: Keep what attention kernels give.
        products: Keep every one (1), every second (2) and so on. 0 keeps none.
    """

    def __init__(self, attention: bool = True, products: int = 1) -> None:
        self.attention, self.products = attention, products

    def begin(self) -> Callable[..., CheckpointPolicy]:
        """The policy of one region, which counts its products: once in forward, and once more in backward."""
        counts = {False: 0, True: 0}

        def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            name = str(operator).removeprefix("aten.").partition(".")[0]
            keep = self.attention and name.startswith(_ATTENTION)
            if name in _PRODUCTS and self.products:
                counts[context.is_recompute] += 1
                keep = counts[context.is_recompute] % self.products == 0
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        return policy


POLICIES = {
    "attention": Keep(attention=True, products=0),
    "matmuls": Keep(attention=True, products=1),
    "every second": Keep(attention=True, products=2),
}

"""FP8 training of linear layers."""

from eke_fp8.arithmetic import chunked_product, round_to, shift_and_squeeze, to_float8
from eke_fp8.plugin import FP8, FP8Error

__all__ = ["FP8", "FP8Error", "chunked_product", "round_to", "shift_and_squeeze", "to_float8"]

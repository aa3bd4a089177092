"""Progressive stacking: train some of a Transformer's blocks first, copy them upward, go on with all."""

from eke_stacking.callback import Stacking
from eke_stacking.operators import OPERATORS, copy_blocks, output_projections, sources, trim

__all__ = ["OPERATORS", "Stacking", "copy_blocks", "output_projections", "sources", "trim"]

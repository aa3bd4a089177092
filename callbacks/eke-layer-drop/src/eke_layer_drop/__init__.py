"""Layer dropping: each step skips some blocks of a Transformer at random."""

from eke_layer_drop.callback import LayerDrop, keep_probabilities, theta

__all__ = ["LayerDrop", "keep_probabilities", "theta"]

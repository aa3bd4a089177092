"""Random layerwise token dropping: middle blocks run on some of the tokens."""

from eke_random_ltd.callback import RandomLTD, RandomLTDError, cut_side_inputs, draw_positions, tokens_at

__all__ = ["RandomLTD", "RandomLTDError", "cut_side_inputs", "draw_positions", "tokens_at"]

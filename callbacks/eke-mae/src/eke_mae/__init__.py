"""Masked image pretraining of a Vision Transformer that a person already has."""

from eke_mae.callback import MAE, MAEError
from eke_mae.decoder import Decoder, pixels_of_patches, positions_2d
from eke_mae.masks import blockwise, random_units, units_hidden

__all__ = [
    "MAE",
    "Decoder",
    "MAEError",
    "blockwise",
    "pixels_of_patches",
    "positions_2d",
    "random_units",
    "units_hidden",
]

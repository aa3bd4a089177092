"""Masked image pretraining of a Vision Transformer that a person already has."""

from eke_mae.callback import MAE
from eke_mae.decoder import Decoder, pixels_of_patches, positions_2d
from eke_mae.masks import blockwise, random_units

__all__ = ["MAE", "Decoder", "blockwise", "pixels_of_patches", "positions_2d", "random_units"]

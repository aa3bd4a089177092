"""Importance sampling by a bound of each sample's gradient norm: of the batch at hand, or as it was last seen."""

from eke_importance_sampling.callback import ImportanceSampling, draw, gain
from eke_importance_sampling.remembered import RAIS, fit_squares, mixed

__all__ = ["RAIS", "ImportanceSampling", "draw", "fit_squares", "gain", "mixed"]

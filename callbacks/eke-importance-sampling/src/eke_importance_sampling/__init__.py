"""Importance sampling by a bound of each sample's gradient norm."""

from eke_importance_sampling.callback import ImportanceSampling, draw, gain

__all__ = ["ImportanceSampling", "draw", "gain"]

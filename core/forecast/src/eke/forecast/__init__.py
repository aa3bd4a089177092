"""What a step will need, before it is launched: a dry run that computes nothing, and what would make it fit."""

from eke.forecast.batch import batches, first_size, resized
from eke.forecast.dry_run import RUN, Forecast, forecast
from eke.forecast.errors import ForecastError
from eke.forecast.timeline import CAUSES

__all__ = ["CAUSES", "RUN", "Forecast", "ForecastError", "batches", "first_size", "forecast", "resized"]

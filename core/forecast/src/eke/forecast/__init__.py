"""What a step will need, before it is launched: a dry run that computes nothing, and what would make it fit."""

from eke.forecast.dry_run import CAUSES, RUN, Forecast, ForecastError, batches, first_size, forecast, resized

__all__ = ["CAUSES", "RUN", "Forecast", "ForecastError", "batches", "first_size", "forecast", "resized"]

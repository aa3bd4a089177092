"""What a forecast refuses."""

from eke.spec import EkeError


class ForecastError(EkeError):
    """The step cannot be run without values, or at all."""

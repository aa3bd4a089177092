"""Adam and AdamW whose two states take 8 bits per parameter each."""

from eke_adam8bit.optimizer import Adam8bitError, AdamW8bit, state_bytes
from eke_adam8bit.plugin import Adam8bit, eight_bit

__all__ = ["Adam8bit", "Adam8bitError", "AdamW8bit", "eight_bit", "state_bytes"]

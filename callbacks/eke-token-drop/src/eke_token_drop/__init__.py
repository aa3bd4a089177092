"""Patch dropout and FLIP: a Vision Transformer trains on some of its patches."""

from eke_token_drop.callback import TokenDrop, choose, keep_at

__all__ = ["TokenDrop", "choose", "keep_at"]

"""Patch dropout and FLIP: a Vision Transformer trains on some of its patches."""

from eke_token_drop.callback import TokenDrop, TokenDropError, choose, keep_at

__all__ = ["TokenDrop", "TokenDropError", "choose", "keep_at"]

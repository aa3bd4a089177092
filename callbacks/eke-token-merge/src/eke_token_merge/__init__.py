"""Token merging while training: each block of a Vision Transformer hands on fewer tokens."""

from eke_token_merge.callback import TokenMerge, match, merge

__all__ = ["TokenMerge", "match", "merge"]

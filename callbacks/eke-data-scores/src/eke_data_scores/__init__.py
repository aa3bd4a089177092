"""Scores of training samples in a file, and training on the part of the data that they choose."""

from eke.seams.scores import Scores, cross_scores, score

from eke_data_scores.callback import Pruned, Score
from eke_data_scores.choice import choose, el2n
from eke_data_scores.embeddings import embed, kmeans, prototypes, redundancy

__all__ = [
    "Pruned",
    "Score",
    "Scores",
    "choose",
    "cross_scores",
    "el2n",
    "embed",
    "kmeans",
    "prototypes",
    "redundancy",
    "score",
]

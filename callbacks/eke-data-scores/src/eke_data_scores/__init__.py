"""Scores of training samples in a file, and training on the part of the data that they choose."""

from eke_data_scores.callback import Pruned, Score
from eke_data_scores.embeddings import kmeans, prototypes, redundancy
from eke_data_scores.offline import cross_scores, embed, score
from eke_data_scores.scores import Scores, choose, el2n

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

"""Scores without labels, from an embedding: distance to the nearest prototype, and likeness to another sample.

Sources: Sorscher, Geirhos, Shekhar and others, "Beyond neural scaling laws: beating power law scaling via data
pruning", NeurIPS 2022, https://arxiv.org/abs/2206.14486 (prototypes); Abbas, Tirumala, Simig and others, "SemDeDup:
Data-efficient learning at web-scale through semantic deduplication", 2023, https://arxiv.org/abs/2303.09540.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from eke import ArgumentError
from eke.seams.batch import size
from eke.seams.scores import Collate
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

_CHUNK = 4096  # rows of a table of distances at once: memory does not grow with the square of the samples


def embed(
    function: Callable[[Any], Tensor], dataset: Any, *, batch_size: int = 256, collate_fn: Collate | None = None
) -> Tensor:
    """Embeddings of all samples, (samples, width), float32, on the CPU.

    Args:
        function: A batch, as the collate function makes it, to (batch, width).
        dataset: Map-style.
        batch_size: Samples at once.
        collate_fn: As the ``DataLoader`` has it.

    Raises:
        ValueError: another shape.
    """
    found = []
    with torch.no_grad():
        for batch in DataLoader(dataset, batch_size, collate_fn=collate_fn):
            one = function(batch)
            if one.ndim != 2 or len(one) != size(batch):
                raise ArgumentError(
                    f"The embedding of a batch of {size(batch)} samples has shape {tuple(one.shape)}. Give (batch, "
                    "width): the class token, say, or the mean over tokens."
                )
            found.append(one.float().cpu())
    return torch.cat(found)


def kmeans(points: Tensor, count: int, *, rounds: int = 100, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from k-means++ seeds.

    Args:
        points: (samples, width), float.
        count: Of clusters.
        rounds: At most.
        seed: Of the seeding.

    Returns:
        Centroids, (count, width), and each sample's cluster, (samples,), int64. No cluster is empty, unless points
        are equal.

    Raises:
        ValueError: more clusters than samples.
    """
    if not 1 <= count <= len(points):
        raise ArgumentError(f"{count} clusters of {len(points)} samples: give 1 or more, and no more than samples.")
    generator = torch.Generator().manual_seed(seed)
    centroids = points[torch.randint(len(points), (1,), generator=generator)]
    far = _distances(points, centroids)[0]
    while len(centroids) < count:
        squares = far.double().square()
        squares = squares if squares.sum() > 0 else torch.ones_like(squares)
        chosen = torch.searchsorted(squares.cumsum(0), torch.rand(1, generator=generator).double() * squares.sum())
        fresh = points[chosen.clamp(max=len(points) - 1)]
        centroids = torch.cat([centroids, fresh])
        far = torch.minimum(far, _distances(points, fresh)[0])
    nearest = _distances(points, centroids)[1]
    for _ in range(rounds):
        sums = torch.zeros_like(centroids).index_add(0, nearest, points)
        sizes = nearest.bincount(minlength=count)
        centroids = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], centroids)
        far, again = _distances(points, centroids)
        empty = (sizes == 0).nonzero()[:, 0]
        centroids[empty] = points[far.argsort(descending=True)[: len(empty)]]
        if torch.equal(again, nearest) and not len(empty):
            break
        nearest = again
    return centroids, nearest


def prototypes(embeddings: Tensor, clusters: int, *, seed: int = 0) -> Tensor:
    """Distance of each sample to the centroid of its cluster, (samples,), float64; higher is harder.

    Args:
        embeddings: (samples, width). They are brought to length 1.
        clusters: About as many as there are classes.
        seed: Of the clustering.

    Source:
        Sorscher and others 2022, section 4.
    """
    points = F.normalize(embeddings.float(), dim=1)
    centroids, nearest = kmeans(points, clusters, seed=seed)
    return (points - centroids[nearest]).norm(dim=1).double()


def redundancy(
    embeddings: Tensor, clusters: int | None = None, *, threshold: float | None = None, seed: int = 0
) -> Tensor:
    """Cosine of each sample to the most alike of those that come before it, (samples,), float64; -1 for a first one.

    Samples of a cluster come in the order of their distance to its centroid, the farthest first. Samples of different
    clusters are not compared. To train without near-duplicates, save this as scores and keep the lowest.

    Args:
        embeddings: (samples, width). They are brought to length 1.
        clusters: By default the root of the number of samples; 1 compares all.
        threshold: Compare only with samples that are themselves no more alike than this. Otherwise, of a chain of three
            whose ends differ, the second and the third both go.
        seed: Of the clustering.

    Source:
        Abbas and others 2023, algorithm 1; ``threshold`` is our addition.
    """
    points = F.normalize(embeddings.float(), dim=1)
    clusters = max(1, round(len(points) ** 0.5)) if clusters is None else clusters
    centroids, nearest = kmeans(points, clusters, seed=seed)
    far = (points - centroids[nearest]).norm(dim=1)
    found = torch.full((len(points),), -1.0, dtype=torch.float64)
    for cluster in range(clusters):
        own = (nearest == cluster).nonzero()[:, 0]
        own = own[far[own].argsort(descending=True, stable=True)]
        found[own] = _alike(points[own], threshold)
    return found


def _alike(points: Tensor, threshold: float | None) -> Tensor:
    most = torch.full((len(points),), -1.0, dtype=torch.float64)
    if threshold is not None:
        kept: list[int] = []
        for i in range(len(points)):
            if kept:
                most[i] = (points[kept] @ points[i]).max().double()
            if most[i] <= threshold:
                kept.append(i)
        return most
    for start in range(0, len(points), _CHUNK):
        part = points[start : start + _CHUNK]
        cosines = part @ points[: start + len(part)].T
        later = torch.arange(cosines.shape[1]) >= torch.arange(start, start + len(part))[:, None]
        most[start : start + len(part)] = cosines.masked_fill(later, -1.0).max(1).values.double()
    return most


def _distances(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """To the nearest centroid, and which one it is."""
    parts = [torch.cdist(part, centroids).min(1) for part in points.split(_CHUNK)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])

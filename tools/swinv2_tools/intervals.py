"""Means over crossed seeds and photos, with confidence intervals that count both."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean and the half width of its interval."""

    mean: float
    half: float


def interval(values: np.ndarray, confidence: float = 0.95) -> Interval:
    """The mean of a quantity over seeds and photos, with an interval for other seeds and other photos.

    Both are random effects of a crossed layout without replication, so that the mean has the variance
    (MS_seeds + MS_photos - MS_rest) / (S * N), with Satterthwaite's degrees of freedom. With few seeds that differ, the
    interval is as wide as Student's t of the S means over photos. With one seed, it is for other photos alone. For a
    difference between two models, give the differences.

    Args:
        values (ndarray): (S, N), a row per seed, a column per photo.
        confidence (float): of the interval.

    Returns:
        Interval: mean and half width.
    """
    values = np.asarray(values, dtype=np.float64)
    seeds, photos = values.shape
    mean = values.mean()
    by_seed, by_photo = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    if seeds == 1:
        variance, freedom = values.var(ddof=1) / photos, photos - 1
        return Interval(mean, stats.t.ppf((1 + confidence) / 2, freedom) * variance**0.5)
    rest = ((values - by_seed - by_photo + mean) ** 2).sum() / ((seeds - 1) * (photos - 1))
    # an effect that shows less than the rest is taken as none: its mean square is then that of the rest
    of_seeds = max(photos * by_seed.var(ddof=1), rest)
    of_photos = max(seeds * by_photo.var(ddof=1), rest)
    total = of_seeds + of_photos - rest
    if total == 0:
        return Interval(mean, 0.0)
    freedom = total**2 / (
        of_seeds**2 / (seeds - 1) + of_photos**2 / (photos - 1) + rest**2 / ((seeds - 1) * (photos - 1))
    )
    return Interval(mean, stats.t.ppf((1 + confidence) / 2, freedom) * (total / (seeds * photos)) ** 0.5)

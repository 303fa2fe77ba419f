"""How sure a difference between two methods is when few categories and seeds were measured."""

from dataclasses import dataclass
from math import inf, sqrt

import numpy as np
from scipy import stats

RESAMPLES = 10_000
LEAST_CATEGORIES = 3  # fewer say nothing about how categories differ: no interval
TAIL = 0.025  # on each side of an interval: 95 %

Cells = list[np.ndarray]  # for each category one value a seed


@dataclass(frozen=True)
class Difference:
    """A difference between two methods: in ``each`` category (C,), and its mean in resamples."""

    each: np.ndarray
    draws: np.ndarray

    @property
    def estimate(self) -> float:
        """The mean over categories."""
        return float(self.each.mean())

    def percentiles(self, tail: float = TAIL) -> tuple[float, float]:
        """The bootstrap's own limits."""
        low, high = np.quantile(self.draws, [tail, 1 - tail])
        return float(low), float(high)

    def limits(self, tail: float = TAIL) -> tuple[float, float]:
        """Limits that the true mean lies beyond with probability ``tail`` on each side.

        The bootstrap's percentiles, but nowhere inside Student's interval over categories: alone
        they are far too narrow for few (see ``coverage``). Infinite below LEAST_CATEGORIES.
        """
        count = len(self.each)
        if count < LEAST_CATEGORIES:
            return -inf, inf
        half = stats.t.ppf(1 - tail, count - 1) * self.each.std(ddof=1) / sqrt(count)
        low, high = self.percentiles(tail)
        return min(low, self.estimate - half), max(high, self.estimate + half)

    def __neg__(self) -> "Difference":
        return Difference(-self.each, -self.draws)


def difference(
    first: Cells, second: Cells, *, seed: int = 0, resamples: int = RESAMPLES
) -> Difference:
    """How far the ``first`` method lies above the ``second``, with its hierarchical bootstrap.

    Both hold the same categories. Each resample draws categories with replacement, the same for
    both methods (paired: what is hard for both cancels), then inside each drawn category and
    method as many seeds as it has. Seeds are not paired: the methods may have other numbers of
    them, and the number of a seed means another network in each.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(first), size=(resamples, len(first)))
    each = np.array([a.mean() - b.mean() for a, b in zip(first, second, strict=True)])
    return Difference(each, _resampled(first, chosen, rng) - _resampled(second, chosen, rng))


def _resampled(cells: Cells, chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The mean (R,) over ``chosen`` categories (R, C) of the means of redrawn seeds."""
    most = max(map(len, cells))
    padded = np.stack([np.resize(cell, most) for cell in cells])
    counts = np.array([len(cell) for cell in cells])[chosen][..., None]
    drawn = (rng.random((*chosen.shape, most)) * counts).astype(int)
    values = padded[chosen[..., None], drawn] * (np.arange(most) < counts)
    return (values.sum(-1) / counts[..., 0]).mean(-1)


def smallest(differences: list[Difference]) -> tuple[int, float, float]:
    """Which difference is the smallest, and a 95 % interval of the smallest true one.

    The lower limit is the lowest of all lower limits, which needs no correction (the smallest
    true difference lies below its own limit as seldom as any). The upper is the lowest upper
    limit, each taken at TAIL divided by their number (Bonferroni): which one is the smallest is
    not known.
    """
    lows = [d.limits()[0] for d in differences]
    highs = [d.limits(TAIL / len(differences))[1] for d in differences]
    return int(np.argmin([d.estimate for d in differences])), min(lows), min(highs)


def coverage(
    categories: int, seeds: int, *, skewed: bool = False, datasets: int = 400, resamples: int = 250
) -> dict[str, float]:
    """How often the ``interval``, and the bootstrap ``percentiles`` alone, hold the true mean.

    Simulated: each data set draws its categories' differences with a standard deviation of 5
    points, normal or ``skewed`` (exponential), and for every seed of both methods an error of 2.
    """
    rng = np.random.default_rng(0)
    hits = np.zeros(2)
    for number in range(datasets):
        true = rng.exponential(size=categories) - 1 if skewed else rng.normal(size=categories)
        first, second = rng.normal(0, 2, (2, categories, seeds))
        first += 5 * true[:, None]
        found = difference(list(first), list(second), seed=number, resamples=resamples)
        for i, (low, high) in enumerate((found.limits(), found.percentiles())):
            hits[i] += low <= 0 <= high
    return dict(zip(("interval", "percentiles"), hits / datasets, strict=True))

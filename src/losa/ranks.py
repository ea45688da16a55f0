"""Rank per block from what pruning did to it, summing exactly to the mean asked (paper, section 2.3)."""

import math


def apportion(weights: list[float], mean: float, largest: int, smallest: int = 1) -> list[int]:
    """Integers proportional to `weights` (equation 7), each within [smallest, largest], with sum round(mean * count).

    Units held at a bound leave the rest to the others; fractions go by largest remainder, ties to the earlier unit.
    A mean outside the bounds is brought to the nearer one.
    """
    count = len(weights)
    total = min(largest * count, max(smallest * count, round(mean * count)))
    weights = [max(0.0, w) if math.isfinite(w) else 0.0 for w in weights]
    if sum(weights) <= 0:
        weights = [1.0] * count
    # the scale at which clipped shares sum to the total: the sum grows with it, so bisect
    low, high = 0.0, largest * count / min(w for w in weights if w > 0)
    for _ in range(200):
        scale = (low + high) / 2
        if sum(min(largest, max(smallest, scale * w)) for w in weights) < total:
            low = scale
        else:
            high = scale
    shares = [min(largest, max(smallest, high * w)) for w in weights]
    ranks = [math.floor(share + 1e-9) for share in shares]
    by_remainder = sorted(range(count), key=lambda u: (ranks[u] - shares[u], u))
    while sum(ranks) != total:
        step = 1 if sum(ranks) < total else -1
        bound = largest if step > 0 else smallest
        for unit in by_remainder if step > 0 else reversed(by_remainder):
            if ranks[unit] != bound and sum(ranks) != total:
                ranks[unit] += step
    return ranks

"""Rank per block from what pruning did to it, summing exactly to the mean asked (paper, section 2.3)."""

import itertools
import math
import sys


def apportion(weights: list[float], mean: float, largest: int, smallest: int = 1) -> list[int]:
    """Integers proportional to `weights` (equation 7), each within [smallest, largest], with sum round(mean * count).

    Units held at a bound leave the rest to the others; fractions go by largest remainder, ties to the earlier unit.
    A mean outside the bounds is brought to the nearer one.
    """
    count = len(weights)
    if not weights:
        return []
    total = min(largest * count, max(smallest * count, round(mean * count)))
    weights = [max(0.0, w) if math.isfinite(w) else 0.0 for w in weights]
    top = max(weights)
    weights = [w / top for w in weights] if top > 0 else [1.0] * count
    # the scale at which clipped shares sum to the total: the sum grows with it, so bisect
    low, high = 0.0, min(sys.float_info.max, largest / min(w for w in weights if w > 0))
    while low < (scale := low + (high - low) / 2) < high:
        if sum(min(largest, max(smallest, scale * w)) for w in weights) < total:
            low = scale
        else:
            high = scale
    shares = [min(largest, max(smallest, high * w)) for w in weights]
    ranks = [math.floor(share + 1e-9) for share in shares]
    by_remainder = sorted(range(count), key=lambda u: (round(ranks[u] - shares[u], 9), u))
    units = itertools.cycle(by_remainder)
    while sum(ranks) < total:
        unit = next(units)
        ranks[unit] += ranks[unit] < largest
    return ranks

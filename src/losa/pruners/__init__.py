"""Weight, statistic of its inputs and how much goes -> weight and keep-mask."""

"""Weight, statistic of its inputs and sparsity -> weight and keep-mask."""

"""Sparsity per block from what is known of the blocks."""

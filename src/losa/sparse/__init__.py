"""Packed weights and what multiplies by them."""

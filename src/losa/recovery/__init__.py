"""How lost quality is won back."""

"""Zero-shot tasks of lm-evaluation-harness: their definitions, their rows from local files, and running them."""

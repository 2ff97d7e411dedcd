"""The squared difference of two linear heads' logits, computed without large logits, for `LinearLogitLoss` alone."""

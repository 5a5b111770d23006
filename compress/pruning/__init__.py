"""Structured pruning: axes along which a network can be cut, the cut itself, its record, and budgets over units."""

"""The search for the best step plan within a latency, or for the fastest at a quality: measured, not estimated."""

"""Training: what a student learns from, what it is asked for, and the loop that can be killed at any time."""

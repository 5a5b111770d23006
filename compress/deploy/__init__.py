"""Deployment: an engine with the little that runs it, as one archive."""

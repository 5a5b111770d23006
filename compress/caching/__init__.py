"""Rules of feature caching: which network calls run in full, and how the others are forecast from them."""

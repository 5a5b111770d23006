"""Runtimes behind one call: load(graph file) gives a function from named arrays to named arrays."""

"""Engine format, lowering and runtime: how to write a compressed model down and run it."""

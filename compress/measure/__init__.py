"""What a compression cost and gained: quality, latency, size, memory, and where error enters."""

"""Measurements: the bus beside its peers, and the node's memory, start and uploads (docs/benchmarks.md)."""

"""Timings against the peers: ``python -m benchmarks.ops``."""

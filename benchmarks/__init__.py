"""Timings against the peers and the machine's own limits: ``python -m benchmarks.ops``."""

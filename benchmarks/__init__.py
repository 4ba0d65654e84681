"""Benchmarks: ratios against a peer or a baseline measured in the same run. Not tests; run them with ``make bench``."""

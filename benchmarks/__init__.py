"""Benchmarks: ratios against a peer or a baseline measured in the same run (``make bench``)."""

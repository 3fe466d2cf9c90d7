"""Measure how far the ceilings of `pctrain fit` can be trusted: `python -m benchmarks.ceilings`."""

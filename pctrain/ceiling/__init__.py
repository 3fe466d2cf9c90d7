"""The science of ceilings: FLOPs, ledger, validation-loss regimes, collapse, ceiling fits, curves. NumPy and SciPy only, no torch."""

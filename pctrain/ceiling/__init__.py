"""Statistics of ceilings: sigmoid fits, collapse detection, loss regimes, forecasts. NumPy and SciPy only, no torch."""

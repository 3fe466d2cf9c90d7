"""Commands that are no run."""

"""The phases, one per file. Each has `run(check)`, called in the phase's own process."""

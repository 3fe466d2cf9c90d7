"""Trajectory sets: split, deduplicate, decontaminate, select. Each command writes what it dropped, and why, beside its output."""

"""Trajectory sets: split, deduplicate, decontaminate, select. Each command writes which records it dropped, and why."""

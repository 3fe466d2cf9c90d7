"""Supervised fine-tuning on expert trajectories."""

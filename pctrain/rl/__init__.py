"""Reinforcement learning from verified rewards."""

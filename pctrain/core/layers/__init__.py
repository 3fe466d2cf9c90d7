"""Layers of the torch specs."""

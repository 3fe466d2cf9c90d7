"""Errors, progress, the device, and plugins: what every folder may use."""

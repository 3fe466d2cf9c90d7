"""A deadline for progress on every rank."""

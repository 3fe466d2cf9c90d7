"""Fixes for upstream packages, one file each."""

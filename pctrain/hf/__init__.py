"""Hugging Face directories, without torch."""

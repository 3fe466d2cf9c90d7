"""The run folder: its only reader and writer."""

"""Process groups and waits."""

"""The typed config tree: what exists, how it is loaded, checked and shown."""

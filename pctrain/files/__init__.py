"""Files: durable writes, locks, npz, YAML."""

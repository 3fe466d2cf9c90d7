"""Layer specs, the layers of the torch specs, and context parallelism."""

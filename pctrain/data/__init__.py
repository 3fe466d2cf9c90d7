"""Data: from records to tokens to packed batches, generated problems, and the order of the samples."""

"""Records, generated problems, tokenizer, packing and the order of the samples."""

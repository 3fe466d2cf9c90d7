"""Every call into vLLM, megatron-core, Transformer Engine and torch, held to the real signatures."""

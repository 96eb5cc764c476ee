"""OLMo-core's own checkpoints, read as if they were Hugging Face's."""

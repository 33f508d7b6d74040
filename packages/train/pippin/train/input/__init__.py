"""Text to packed batches: sources, tokenizer training, the seqio pipeline, and the order of samples."""

"""A Llama without gradients: packed forward, decoders, sampling and their kernels."""

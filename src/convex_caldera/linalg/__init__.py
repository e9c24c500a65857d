"""Matrix algebra that knows nothing of quantization: factorizations, truncated SVD, Hadamard."""

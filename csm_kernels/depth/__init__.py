"""The fused codebook decode: all codebooks of one frame in one call."""

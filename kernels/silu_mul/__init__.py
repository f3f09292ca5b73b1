"""silu(gate) * up (SwiGLU: Shazeer 2020) of a fused gate and up product. On devices only: see `device`."""

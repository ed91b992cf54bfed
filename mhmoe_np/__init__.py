"""Framework-free reference implementation of Multi-Head Mixture-of-Experts (arXiv 2411.16205)."""

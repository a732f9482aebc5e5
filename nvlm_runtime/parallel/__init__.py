"""Tensor parallelism: collectives, the share of the weights that a rank holds, and its processes."""

"""Benchmarks: speed in this folder, proofs about kernels in proofs, experiments with models in experiments."""

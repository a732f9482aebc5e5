"""Requests to answers: the classes NVLM and Engine, batches, decode steps, CUDA graphs, sampling."""

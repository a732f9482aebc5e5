"""Benchmarks on local files: rows, prompts, metrics, predictions, reports."""

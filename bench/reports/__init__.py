"""What becomes of the measurements: result files, tables, charts, and the table in docs/benchmarks.md."""

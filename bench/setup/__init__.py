"""What a benchmark needs before it measures: random models, gloo processes, a meter of memory."""

"""Steps that go wrong, for `test_gpu_visit`."""

"""One op a file: formula, reference, kernels, autograd, the public function."""

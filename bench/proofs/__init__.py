"""What is known of the kernels without a GPU: machine code, bytes, predictions, the rules of CUDA graphs."""

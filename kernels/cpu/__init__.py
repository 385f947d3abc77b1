"""C++ versions of operations for CPU tensors, compiled on the machine that runs them."""

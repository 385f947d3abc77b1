"""The Triton kernels on a GPU: right, and how near to what the machine can do."""

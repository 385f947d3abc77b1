"""Pure functions on tensors: Triton kernels, each beside its torch twin."""

# transformers looks for an unrelated distribution of this name and reads its version.
__version__ = "0.1.0"

"""The Triton half of every operation. Imported only where a kernel is launched or tested."""

"""KV beyond the pool: blocks of the prefix cache in host memory and on disk, and back."""

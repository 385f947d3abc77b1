"""The bandwidth-bound pool: admits handed-off KV under grants and batches token generation."""

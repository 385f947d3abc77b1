"""The compute-bound pool: queues prompts, computes their KV in chunks, hands it off."""

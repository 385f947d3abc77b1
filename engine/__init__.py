"""One model on one worker: token ids in, token ids out. Knows no role, no network, no text."""

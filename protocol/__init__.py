"""What crosses a process boundary: messages, errors, KV geometry. Imports no torch."""

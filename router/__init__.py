"""HTTP, text and JSON; picks workers; owns the request. Imports no torch."""

"""Moves KV block rows between workers' arenas.

Knows buffers, block ids and grants; knows nothing of requests, schedulers, ZMQ or models.
"""

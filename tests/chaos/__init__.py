"""Scenarios that break a running deployment on purpose, and what its clients notice.

Every scenario plays over real processes and yields figures; ``docs/reliability.md`` says which
promise each one holds kvferry to. ``python -m tests.chaos`` plays them for many seeds,
``python -m tests.chaos.soak`` for a long time; CI plays each once.
"""

"""Load on any OpenAI endpoint, and what its clients felt: ``kvferry bench``.

    arrivals, workload ──> load ──requests──> client ──> connection, sse ══HTTP══> endpoint
                            │
                            └──results──> record ──> measures ──> report, terminal, compare, sweep

Knows nothing of kvferry's insides: a peer is measured by the same code.
"""

"""The ``kvferry`` command: the processes' entry points and the local launcher."""

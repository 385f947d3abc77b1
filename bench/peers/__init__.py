"""kvferry beside other engines and transfer engines; see ``__main__`` for the commands."""

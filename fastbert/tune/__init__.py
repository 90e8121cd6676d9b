"""The command `fastbert tune` measures which block sizes and other choices are the fastest on a GPU."""

from fastbert.tune.search import use_table as use_table

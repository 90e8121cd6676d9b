"""The command `fastbert tune`: block sizes and other choices that suit a GPU, found by timing."""

from fastbert.tune.search import use_table as use_table

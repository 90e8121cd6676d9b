"""This package has the code shared by `fastbert bench` and benchmarks/: timing, peers, results and their report."""

"""`fastbert bench` and the suites in benchmarks/ share this: timing, peers, results and their report."""

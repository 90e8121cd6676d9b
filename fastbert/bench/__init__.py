"""What measures: timing, peers, results and their report. `fastbert bench` and the suites in benchmarks/ share it."""

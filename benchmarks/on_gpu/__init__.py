"""What `benchmarks/gpu.py` measures: a kernel family a file, and how all of them are checked and timed."""

"""The benchmarks of launch/bench.py, which measure this project beside stock PyTorch."""

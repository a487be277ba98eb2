"""What launch/bench.py measures: this project beside stock PyTorch."""

"""One script a figure of docs/performance.md: `python -m benchmarks.<name>`."""

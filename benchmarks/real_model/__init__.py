"""What the adapter does to a model of yours, on data of yours: ``python -m benchmarks.real_model``."""

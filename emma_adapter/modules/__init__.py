"""Tools for any ``nn.Module``: guarded methods, sharded weights, wrappers of other libraries, recomputation."""

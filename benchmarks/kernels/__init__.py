"""Time and memory of the fusions: the authors' formulation, PyTorch's own means, and the Triton kernels."""

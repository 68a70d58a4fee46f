"""Training at the speed of an NVIDIA GPU: CUDA graphs, and fused Triton kernels."""

"""Triton kernels, for CUDA; with TRITON_INTERPRET=1 they run on a CPU, slowly, for tests."""

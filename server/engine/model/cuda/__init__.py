"""Llama-like models on a GPU: joined products, Triton kernels, and decode steps as CUDA graphs."""

"""Llama-like models on a CPU: one native call for each step."""

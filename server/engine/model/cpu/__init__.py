"""Llama-like models on a CPU: one native call a step."""

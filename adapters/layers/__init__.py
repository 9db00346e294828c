"""Wrappers around the base's modules that apply each token's adapter."""

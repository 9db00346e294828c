"""Evaluation: compares an adapter with the base on held-out rows, in the serving engine. Knows no HTTP.

``metrics.py`` and ``gate.py`` import neither torch nor the engine; ``evaluate.py`` does.
"""

"""Evaluation: an adapter beside the base on held-out rows, through the serving engine. Knows no HTTP.

``metrics.py`` and ``gate.py`` are numbers and sentences alone; ``evaluate.py`` brings the engine.
"""

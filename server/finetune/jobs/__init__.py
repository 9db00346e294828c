"""Fine-tuning: uploaded files and jobs in one SQLite database, and the child processes that train.

Knows neither HTTP nor torch. ``training.Training`` is the whole of it, opened once a server.
"""

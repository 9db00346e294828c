"""Fine-tuning jobs: uploaded files and jobs in one SQLite database, and the processes that train.

This package knows neither HTTP nor torch. A server opens one ``training.Training``.
"""

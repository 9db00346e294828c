"""Coverage-guided fuzzing of the code that reads bytes from outside. See ``python -m tests.fuzz --help``."""

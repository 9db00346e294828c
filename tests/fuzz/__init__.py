"""Coverage-guided fuzzing of what outsiders' bytes meet first. ``python -m tests.fuzz --help`` runs it."""

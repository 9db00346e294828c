"""A stateful test of a whole server: actions of operators and clients, and accidents, in any order."""

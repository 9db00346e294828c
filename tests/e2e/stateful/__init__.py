"""A model-based test of a whole server: what operators, clients and accidents do to it, in any order."""

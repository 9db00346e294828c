"""Helpers for the tests of more than one folder. Helpers for one folder are beside its tests."""

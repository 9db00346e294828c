"""Samples for the default base: data, recipes, and two trained adapters, ``pirate`` and ``json-answers``.

``manylora bench quality`` trains and measures them all; ``generate.py`` writes the made-up tenants' data.
"""

"""Samples for the default base: data, recipes, and two trained adapters, ``pirate`` and ``json-answers``.

``manylora bench quality`` trains and measures all of them. ``generate.py`` writes the synthetic tenants'
data.
"""

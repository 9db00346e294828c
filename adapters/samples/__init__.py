"""Two small adapters for the default base, ``pirate`` and ``json-answers``, with their data and recipe."""

"""OpenAI's protocol over the ``Service`` of ``server/engine/interface.py``. Knows no torch."""

"""OpenAI's protocol over the ``Service`` of ``server/engine/request.py``. Knows no torch."""

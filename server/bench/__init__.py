"""``manylora bench``: load against any OpenAI-compatible server, and the peers' runners.

Talks HTTP like any client; it imports nothing of ``server/engine`` or ``server/http``. The measuring process
imports no torch, so that it stays light beside the server it measures.
"""

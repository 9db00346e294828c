"""``manylora train``: data in, a published adapter out. Training itself is ``adapters.training``."""

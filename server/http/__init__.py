"""OpenAI's API over the ``Service`` of ``server/engine/interface.py``. This package does not import torch."""

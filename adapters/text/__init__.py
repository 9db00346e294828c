"""Converts conversations to tokens, in the same way for training, evaluation and serving. Imports no torch.

Reading order: ``messages.py`` (the message type), ``template.py`` (chat templates), ``special.py`` (special
tokens that users write stay text), ``renderer.py`` (the whole conversion), ``chat_format.py`` (each adapter's
format).
"""

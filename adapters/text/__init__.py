"""Conversations → tokens, in the one way that training, evaluation and serving share. Imports no torch.

Reading order: ``messages.py`` (what a conversation is; light), ``template.py`` (chat templates),
``special.py`` (special tokens that people write stay text), ``renderer.py`` (all of it together).
"""

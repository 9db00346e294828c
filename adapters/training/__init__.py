"""A tenant's rows in, a plain PEFT folder out: QLoRA on exactly the 4-bit weights that the server serves.

Nothing here knows of the server, of publishing or of jobs. Importing this package imports no torch, so that
uploads can be checked (``dataset``) and options declared (``recipe``) without it.
"""

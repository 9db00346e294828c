"""The engine: requests in, tokens out. Knows no HTTP."""

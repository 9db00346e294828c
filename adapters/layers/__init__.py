"""The base's modules wrapped, so that each token gets what its adapter adds or has in their place."""

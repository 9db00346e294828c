"""``manylora bench serving``: a load generator that compares servers under the same load."""

"""``manylora bench serving``: a load generator, and servers compared under the same load."""

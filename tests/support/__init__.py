"""What the tests of more than one room use. What one room uses stands beside its tests."""

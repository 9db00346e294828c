"""Everything about adapters and the 4-bit base they share. Imports nothing from ``server``."""

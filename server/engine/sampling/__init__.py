"""From logits to tokens: logits processors, truncation, and draws that depend on (seed, position) alone."""

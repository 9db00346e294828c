"""From logits to tokens: logits processors, truncation and sampling."""

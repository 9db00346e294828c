"""Memory for adapters: rank rows at every site, extras, and the host tier."""

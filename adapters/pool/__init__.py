"""Device memory for adapters: rank rows at every site, what adapters have besides, and the host tier."""

"""Training data on disk: its forms, its index, its samples, and what can be wrong with them."""

"""Level 1: Hugging Face folders: their config.json, the names of their weights, and the files as a whole."""

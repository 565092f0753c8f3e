"""Level 0: conversations, templates, tokenizers, packing and loading. Nothing here imports the model."""

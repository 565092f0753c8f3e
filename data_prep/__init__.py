"""Data preparation: native files of every known shape -> Conversation JSONL with a manifest (python -m data_prep)."""

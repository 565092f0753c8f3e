"""Level 3: weights out of and into other people's formats, with the proof that they are the same."""

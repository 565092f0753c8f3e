"""Level 3: decoding for many at once, and the HTTP server and the terminal that speak to it."""

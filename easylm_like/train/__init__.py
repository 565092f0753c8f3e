"""Level 2: the configuration of a run, loss, optimizer, step, checkpoints and the loop around them."""

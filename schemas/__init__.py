"""Floor 0: the values that travel between processes or are stored, and every name on the bus. No I/O."""

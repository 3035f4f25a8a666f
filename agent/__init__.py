"""Floor 3: one edge node. It publishes its capacity, runs the blocks a signed plan gives it, and serves requests."""

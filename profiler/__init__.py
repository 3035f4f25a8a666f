"""Floor 2: what a device measures of itself, and what a plan would cost on it."""

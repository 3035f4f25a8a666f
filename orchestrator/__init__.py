"""Floor 3: decides where blocks run, and moves deployments from one plan to the next without a gap."""

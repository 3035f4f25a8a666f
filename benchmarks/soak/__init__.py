"""An hour of mixed load under faults at random: what leaks, what hangs, and whether every request is accounted for."""

"""What the README's figures come from: measured side by side in one run, printed as tables, kept as JSON."""

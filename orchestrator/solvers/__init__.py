"""PURE: exact algorithms that cut a chain of blocks and place the pieces (mathematics.md A2)."""

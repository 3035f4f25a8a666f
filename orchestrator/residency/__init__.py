"""PURE: which blocks of which models lie on which disks and in which memories (`mathematics.md`, part C)."""

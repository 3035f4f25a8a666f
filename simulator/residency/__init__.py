"""Worlds of many models on small disks: who decides which blocks lie where (`mathematics.md`, part C)."""

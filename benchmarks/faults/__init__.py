"""Faults, done to real processes while real requests run: what is lost, and how long until tokens come again."""

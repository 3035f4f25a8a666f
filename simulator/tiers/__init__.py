"""Modular models in virtual time: core services that stay where they were put, light ones that come and go."""

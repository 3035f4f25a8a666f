"""Resplit beside llama.cpp RPC and Ray, on one machine in one run."""

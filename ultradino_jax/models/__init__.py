"""Modules that own parameters, and nothing else."""

"""Recipes: ConfigDicts for main.py and eval.py."""

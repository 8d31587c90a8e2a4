"""Preference data and prompts, their split, and conversations as tokens."""

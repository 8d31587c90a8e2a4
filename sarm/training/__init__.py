"""Training a SARM."""

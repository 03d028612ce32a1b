"""Runnable programs, and the small models and texts that they use."""

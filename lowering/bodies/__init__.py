"""Operators as functions that can be traced: a body in ATen for each that a target has no form of."""

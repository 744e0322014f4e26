"""Likelihood and sample quality."""

"""Mixture-of-Experts layers for JAX."""

"""The trainer: config-driven runs over the moejax library."""

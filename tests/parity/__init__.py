"""Against code that nobody here wrote: needs torch and transformers, so only `.ci/all parity` runs it."""

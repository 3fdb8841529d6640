"""Runs that ship with moejax; each file has `config() -> TrainConfig`."""

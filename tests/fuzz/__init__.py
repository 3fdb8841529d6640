"""Damaged files for every reader: each must be read, or end in one line with exit code 2.

`python -m tests.fuzz --inputs 10000` does it for all readers, `--reader parquet` for one.
"""

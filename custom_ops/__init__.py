"""Native ops under moejax and their specification."""

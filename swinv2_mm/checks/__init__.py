"""Checks of a user's data, options and settings before anything is written: each mistake is one line."""

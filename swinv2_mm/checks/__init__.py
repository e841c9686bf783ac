"""What is checked of a user's data, options and settings before anything is written, so that mistakes are one line."""

"""Around a run: errors, seeding, files, configs and flags, table, console, signals. Imports nothing of this project."""

VERSION = "1.0.0"

"""Around a run: errors, seeding, files, configs and flags, table, signals. Imports nothing of this project."""

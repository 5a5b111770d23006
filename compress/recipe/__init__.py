"""The recipe: YAML to typed fields, every error with file, line and key."""

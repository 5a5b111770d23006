"""Writing an engine folder, and putting it in its place in one step."""

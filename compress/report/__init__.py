"""What was measured, as data, for the terminal and as a page."""

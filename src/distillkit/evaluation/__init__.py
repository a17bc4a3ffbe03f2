"""What a run and its student are measured by."""

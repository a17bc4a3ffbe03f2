"""Teachers: they score positions, without a gradient."""

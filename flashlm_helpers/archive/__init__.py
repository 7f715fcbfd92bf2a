"""Models of the past, kept to compare with. Nothing imports them but by their names."""

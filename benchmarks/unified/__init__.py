"""Time and memory of drawing."""

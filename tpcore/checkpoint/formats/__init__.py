"""What each family of programs writes: recognised, read and written, one file per container."""

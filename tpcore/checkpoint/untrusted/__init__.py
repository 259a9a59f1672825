"""Reading files that nobody vouches for: strictly, within bounds, executing nothing."""

"""The tour on the embedded world, and the long comparison whose table carries the claims."""

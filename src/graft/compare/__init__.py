"""`graft compare`: methods, settings and seeds on the user's own data, and what the differences are worth."""

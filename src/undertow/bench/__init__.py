"""`undertow bench`: what our models cost against the plain ones, measured in one process at the published sizes."""

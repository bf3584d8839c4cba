"""A/B of somebody's own training command: ``compare`` runs it twice, ``recorder`` writes down each step from inside."""

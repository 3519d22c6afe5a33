"""From a recipe to a plan: what becomes of each tensor, decided before any weight is read."""

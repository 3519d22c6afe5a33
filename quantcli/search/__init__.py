"""Budgets: the smallest, or the best, mix of schemes that keeps what a user asked for."""

"""Figures, tables and model cards of finished runs, and publishing them."""

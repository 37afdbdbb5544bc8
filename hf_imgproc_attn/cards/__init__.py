"""Model cards: run records and what they mean, rendered as a README of measured results."""

"""Graders of answers. For mathematics: text to one notation, notation to a typed value, values to a verdict."""

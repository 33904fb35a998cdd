"""Imported by the server that grader processes fork from: what grading mathematics needs is loaded once, not in each of them."""

from r1jax.rewards.answers import math_answer

math_answer.load()

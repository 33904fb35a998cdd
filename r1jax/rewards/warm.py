"""Loads what grading mathematics needs. The server that grader processes fork from imports it, so it is loaded once."""

from r1jax.rewards.answers import math_answer

math_answer.load()

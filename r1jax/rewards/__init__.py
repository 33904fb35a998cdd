"""Rewards: graders, their weighted sum, and the pool of killable grader processes. Only `models` imports jax."""

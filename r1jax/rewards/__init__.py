"""Rule rewards: graders, their composition and the pool of killable grader processes. Nothing here imports jax."""

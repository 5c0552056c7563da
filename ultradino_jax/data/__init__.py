"""Sources, crops, masks and the input pipeline: numpy only, never jax."""

"""DINOv2 pretraining and evaluation for ultrasound in JAX/Flax."""

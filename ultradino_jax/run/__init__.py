"""The loop around the step: plan, batches, workdir, logs, stops."""

"""The science: objective, losses, train step, crops on the device."""

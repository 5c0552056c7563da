"""Looks at a run: the teacher on fixed images, alarms, pictures."""

"""What an ingredient gains: paired trainings with and without it, all measured in the same way. Starts trainings and
reads their checkpoints; trainings do not depend on it."""

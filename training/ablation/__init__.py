"""What an ingredient gains: paired trainings with and without it, and the same question to all of them. It starts
trainings and reads their checkpoints; nothing of a training knows of it."""

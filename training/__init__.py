"""Training, sampling and evaluation of a cascade."""

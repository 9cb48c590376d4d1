"""The mathematics of diffusion: schedules, losses, samplers, counter-based noise. Imports config."""

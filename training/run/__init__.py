"""One training run: its directory, session, tracking, watchdog, validation, sample grid. Imports cascade and below."""

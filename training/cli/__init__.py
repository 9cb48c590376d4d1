"""From words on the command line to a validated config. Imports plan, config and processes."""

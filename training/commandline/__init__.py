"""What stands between a typed command line and a checked config: composing, explaining mistakes, help. No torch."""

"""Shows runs: their curves as numbers, as a page, as a picture and in a terminal. Only reads files."""

"""What runs look like: their curves as numbers, as a page, as a picture and in a terminal. Reads files only."""

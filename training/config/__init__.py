"""Every setting with its type, default and valid values; the table of commands. Imports no torch and no other room."""

"""Every setting with its type, default and valid values; the table of commands. Imports neither torch nor any other
folder of `training`."""

"""From bytes to values: decodes and draws pictures, reads captions; no I/O. Imports order and common."""

"""Bytes to values: pictures and captions, decoded or drawn, without I/O. Imports order and common."""

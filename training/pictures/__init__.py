"""Sheets of labelled pictures as PNG. Imports no other room."""

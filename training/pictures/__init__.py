"""Sheets of labelled pictures as PNG, and their signatures. Imports no other room."""

"""Figures about pictures: features, metrics, the oracle for drawn scenes, the report. Imports pictures and text."""

"""Sheets of labelled pictures as PNG, plots of intervals, and signatures of pictures. Imports no other folder of
`training`."""

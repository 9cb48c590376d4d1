"""Bytes in and out: every scheme (disk, s3://) is known here and nowhere else. Imports common."""

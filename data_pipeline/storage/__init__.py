"""Bytes in and out: the only folder that knows about schemes (disk, s3://, ...). Imports common."""

"""Feature extractors: networks from local files with a stated SHA-256; nothing is ever downloaded."""

"""Tables of pictures and captions: their rows by number, in any format. Imports content and below."""

"""Random bytes against the readers of text. Belongs here: what must hold for any bytes. Does not belong here: cases."""

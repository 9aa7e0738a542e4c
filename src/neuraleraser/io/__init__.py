"""Files: how they are written."""

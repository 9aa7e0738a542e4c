"""Everything that touches the disk: the one file format, atomic writing, reading strangers' files, names for files."""

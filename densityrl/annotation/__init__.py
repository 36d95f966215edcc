"""The local page on which people compare shapes. Needs the extra `annotate`."""

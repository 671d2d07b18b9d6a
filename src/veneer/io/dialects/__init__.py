"""Foreign file formats, each a pair of pure functions between its dicts and Veneer's records."""

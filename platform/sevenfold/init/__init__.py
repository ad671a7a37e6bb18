"""`sevenfold init`: looks at data of one's own, and writes a recipe that trains on it."""

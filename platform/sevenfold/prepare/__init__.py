"""Preparation of a run: checks the recipe, its data and its model, and sets up the tokenizer."""

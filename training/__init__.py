"""What made the small weights that ship: one command for each, and a card beside the weights."""

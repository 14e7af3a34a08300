"""What made the small weights that ship: not part of the product, nor are its data of the repository."""

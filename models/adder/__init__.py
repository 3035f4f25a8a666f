"""A small decoder that adds two numbers, trained from nothing on sums it makes up itself."""

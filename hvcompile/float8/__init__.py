"""Float8: the number format, products, attention, and weights that are kept in it."""

"""What hvfast would do with a model and what that costs: as data, as text, and as an HTML report."""

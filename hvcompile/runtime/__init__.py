"""What happens at a call: state, weights and derived inputs between calls, and whether ranks agree."""

"""Parameters without memory: what they can be asked, and those whose values stay on the host."""

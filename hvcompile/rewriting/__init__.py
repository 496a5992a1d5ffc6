"""What the passes rewrite with: each module is one matcher or one piece of a rewrite."""

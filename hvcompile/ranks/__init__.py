"""Several ranks: how they are started, how a sequence lies on them, and what they tell each other."""

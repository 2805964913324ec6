"""One process a rank: what they exchange, and how they enter and leave a call together."""

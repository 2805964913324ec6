"""One process per rank: collectives between them, and how they enter and leave a call together."""

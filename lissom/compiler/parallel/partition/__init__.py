"""A program for all ranks from one with placements: weights are split, and collectives put in."""

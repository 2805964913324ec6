"""The positions that are visible to an attention, derived from the calls that compute its mask."""

"""The pass `rotate`, its orthogonal bases, and the analysis of the channels that can have another basis."""

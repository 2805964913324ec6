"""The pass `eliminate-dead-heads` and how it takes heads out."""

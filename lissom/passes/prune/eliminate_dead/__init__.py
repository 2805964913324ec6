"""The pass `eliminate-dead`: what each kind of unit takes to be removed."""

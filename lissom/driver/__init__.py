"""One compile from start to end: what is asked for is resolved, passes run, and what each gained is weighed."""

"""Capture of the graphs that Dynamo makes under `torch.compile`."""

"""Tests of lissom.frontends.checkpoints."""
